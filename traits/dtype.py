"""One spelling of each dtype: torch's attribute name, e.g. "float32", "bfloat16", "float8_e4m3fn"."""

from __future__ import annotations

_ALIASES = {
    "float64": ("double", "fp64", "f64"),
    "float32": ("float", "fp32", "f32"),
    "bfloat16": ("bf16",),
    "float16": ("half", "fp16", "f16"),
    "float8_e4m3fn": ("fp8_e4m3fn", "fp8e4nv"),
    "float8_e4m3fnuz": ("fp8_e4m3fnuz", "fp8e4b8"),
    "float8_e5m2": ("fp8_e5m2", "fp8e5"),
    "float8_e5m2fnuz": ("fp8_e5m2fnuz", "fp8e5b16"),
    "float8_e8m0fnu": ("e8m0", "ue8m0"),
    "float4_e2m1fn_x2": (),
    "int64": ("long", "i64"), "int32": ("int", "i32"), "int16": ("short", "i16"), "int8": ("i8",),
    "uint64": ("u64",), "uint32": ("u32",), "uint16": ("u16",), "uint8": ("u8",),
    "bool": (),
    "complex64": ("cfloat",), "complex128": ("cdouble",),
}
NAMES = tuple(_ALIASES)
_BY_SPELLING = {name: name for name in NAMES} | {a: name for name, aliases in _ALIASES.items() for a in aliases}


def dtype_name(value: object) -> str:
    """The canonical name of a dtype given by name, alias ("fp32", "bf16", "half", "torch.float32") or as a torch.dtype
    or numpy.dtype object, which is read by its str(): neither package is imported.

    Raises ValueError. "fp8" and "fp8_e4m3" are refused: NVIDIA's e4m3fn and AMD's e4m3fnuz are different formats.
    """
    if isinstance(value, str):
        text = value.strip().lower()
    elif type(value).__module__.partition(".")[0] in ("torch", "numpy") and "dtype" in type(value).__name__.lower():
        text = str(value)  # "torch.float32", "float32"
    else:
        raise ValueError(f"{type(value).__name__} is not a dtype; give a name such as 'bfloat16' or a torch.dtype")
    try:
        return _BY_SPELLING[text.removeprefix("torch.")]
    except KeyError:
        pass
    if text in ("fp8", "float8", "fp8_e4m3", "float8_e4m3"):
        raise ValueError(f"{value!r} names no one format; say float8_e4m3fn or float8_e4m3fnuz")
    from difflib import get_close_matches

    near = get_close_matches(text.removeprefix("torch."), _BY_SPELLING, n=1, cutoff=0.6)
    raise ValueError(f"unknown dtype {str(value)!r}; "
                     + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"))
