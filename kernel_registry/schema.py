"""The shape of registry, override and tiles files: pydantic models, their errors told with file and line, their JSON
Schema.

What a key means is the business of the module that reads it; here is only which keys exist. A key that is not here is
an error, and every key that is here is read somewhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from . import targets
from .document import Document
from .errors import DocumentError, suggestion


def _scalar(value: object, union) -> object:
    """One problem instead of one for each member of the union."""
    try:
        return union(value)
    except ValidationError:
        raise PydanticCustomError("scalar", "expected text, a finite number, true or false") from None


def plain_tile(value: object, place: str = "the tile") -> dict:
    """`value`, if it is launch parameters: nested mappings of whole numbers, true, false and text."""
    if not isinstance(value, dict) or not value:
        raise PydanticCustomError("tile", "{place} is not a mapping of launch parameters", {"place": place})
    for key, item in value.items():
        if type(key) is not str:
            raise PydanticCustomError("tile", "{place} has a key that is not text: {key}", {"place": place, "key": key})
        if isinstance(item, dict):
            plain_tile(item, key)
        elif type(item) not in (int, bool, str):
            raise PydanticCustomError("tile", "{place} is neither a whole number, true, false, text nor a mapping of "
                                              "such", {"place": key})
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w.\-]*$")]
Plain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w\-]*$")]
Keyword = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
Scalar = Annotated[Union[bool, int, Annotated[float, Field(allow_inf_nan=False)], str], WrapValidator(_scalar)]
Count = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*$")]
Tile = Annotated[dict[str, Any], WrapValidator(lambda value, _: plain_tile(value))]
_TARGET = f"^{targets.FORM}$"
Target = Field(pattern=_TARGET, description="module:attribute, imported when first needed")
When = Field(default_factory=dict, description="trait: value, [values], any, {min, max, multiple_of}, {not: ...}; "
                                               "relations: [expressions]; python: [module:function]")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class VariantEntry(_Strict):
    """One kernel with other options, for a part of what its implementation serves."""

    options: dict[Keyword, Scalar] = Field(default_factory=dict,
                                           description="laid over the implementation's, key by key")
    summary: str = Field("", description="one line for people; absent: the implementation's")
    when: dict[str, Any] = Field(
        description="laid over the implementation's, line by line; what stands under `relations` and `python` is added")
    rank: Optional[int] = Field(None, description="absent: the implementation's")


class ImplementationEntry(_Strict):
    """One kernel: where it is and what it serves."""

    target: str = Target
    options: dict[Keyword, Scalar] = Field(
        default_factory=dict, description="keywords for the target beside the traits: how one target serves as several "
                                          "implementations")
    summary: str = Field("", description="one line for people, shown by `list`")
    when: dict[str, Any] = When
    rank: int = Field(0, description="higher goes first among implementations of which none is provably narrower")
    fallback: bool = Field(False, description="goes after every implementation that is not a fallback")
    numerics: Optional[str] = Field(
        None, description="implementations of one op with the same tag agree bit for bit; "
                          "batch-invariant plans need it")
    accepts_output_alias: bool = Field(
        False, description="writes its result into an `out` that the caller brings, whatever the distance of its rows; "
                           "without it the result is copied there")
    tiles: Optional[str] = Field(
        None, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$",
        description="module with `default(traits, num_tokens)` and `candidates(traits, num_tokens)`; the target is "
                    "given a keyword `tiles`, a function of num_tokens")
    prepare: Optional[str] = Field(
        None, pattern=_TARGET,
        description="module:function that makes, once at load, the arguments that the contract calls prepared; the "
                    "kernel refuses others")
    variants: dict[Plain, VariantEntry] = Field(
        default_factory=dict, description="the same kernel with other options for a part of these calls, each an "
                                          "implementation called NAME.VARIANT")


class OpEntry(_Strict):
    """One op: its contract and its implementations."""

    contract: Optional[str] = Field(None, pattern=_TARGET,
                                    description="module:Class, a kernel_registry.contract.Contract; given once per op")
    implementations: dict[Name, ImplementationEntry] = Field(default_factory=dict)


class RegistryFile(_Strict):
    """registry.yaml: the single truth of what exists."""

    version: Literal[1]
    ops: dict[Name, OpEntry]


class OverrideEntry(_Strict):
    """One line of an override file: exactly one of use (strict), prefer (soft) and disable."""

    op: str
    use: Optional[str] = Field(
        None, description="this implementation or a variant of it; a call that it can't serve raises")
    prefer: Optional[str] = Field(
        None, description="this implementation or a variant of it where it can serve, else as without the line")
    disable: Optional[str] = Field(None, description="never this implementation, nor one of its variants")
    when: dict[str, Any] = When
    model: Optional[str] = Field(None, description="only inside registry.model(NAME): target, draft, vision, ...")
    reason: str = Field("", description="shown by explain: who decided this and why")


class OverrideFile(_Strict):
    """An override file: changes choices without code; names only what is registered."""

    version: Literal[1]
    overrides: list[OverrideEntry] = Field(default_factory=list)
    ops: dict[Name, OpEntry] = Field(default_factory=dict, description="new implementations; needs allow_targets=True")


class Versions(_Strict):
    """What tiles were timed with."""

    torch: Optional[str] = None
    triton: Optional[str] = None


class TilesEntry(_Strict):
    """What was tuned for one implementation, with one set of traits, on one device."""

    device: str = Field(min_length=1, description="what torch.cuda.get_device_name() says; cpu or interpreter without "
                                                  "a GPU")
    op: str
    implementation: str = Field(description="one that declares `tiles`; a variant by its own name")
    traits: dict[str, Scalar] = Field(description="those that differ from their default, neither the platform nor "
                                                  "dynamic ones")
    versions: Versions = Field(default_factory=Versions, description="what the tiles were timed with")
    num_tokens: dict[Count, Tile] = Field(min_length=1, description="number of tokens: tile, nested mappings of whole "
                                                                    "numbers, true, false and text")


class TilesFile(_Strict):
    """A tiles file: launch parameters found by `kernel-registry tune`."""

    version: Literal[1]
    tiles: list[TilesEntry]


_Model = TypeVar("_Model", bound=BaseModel)


def validate(model: type[_Model], document: Document) -> _Model:
    """`document` as a `model`, or a DocumentError that names the first wrong line and counts the rest."""
    data = document.data
    if not isinstance(data, dict):
        raise DocumentError(f"expected a mapping that starts with `version: 1`, got {type(data).__name__}",
                            where=document.where())
    version = data.get("version", 1)
    if type(version) is not int or version != 1:  # first: another version may have other keys; and 1.0 == 1 == True
        raise DocumentError(f"unknown version {version!r}", where=document.where(("version",)),
                            hint="this release reads `version: 1`")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # A misspelt key explains a missing one: it goes first.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    path = tuple(part for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    place = ".".join(map(str, path)) or "the file"
    if first["type"] == "extra_forbidden":
        entry = _entry_at(model, path[:-1])
        hint = suggestion(path[-1], entry.model_fields)
        if entry is VariantEntry and path[-1] in ImplementationEntry.model_fields:
            hint = f"only an implementation has `{path[-1]}`; a variant has {', '.join(entry.model_fields)}"
        raise DocumentError(f"unknown key {path[-1]!r}{more}", where=document.where(path), hint=hint)
    if first["type"] == "missing":
        raise DocumentError(f"{place} is missing{more}", where=document.where(path[:-1]), hint=f"add `{path[-1]}: ...`")
    raise DocumentError(f"{place}: {first['msg']}, got {first['input']!r:.60}{more}", where=document.where(path))


def _entry_at(model: type[BaseModel], path: tuple) -> type[BaseModel]:
    """The model of the entry at `path` in a file that is a `model`: how deep it stands says which."""
    if not path:
        return model
    if path[0] == "overrides":
        return OverrideEntry
    if path[0] == "tiles":
        return Versions if "versions" in path else TilesEntry
    return {2: OpEntry, 4: ImplementationEntry, 6: VariantEntry}[len(path)]


def json_schema(kind: Literal["registry", "overrides", "tiles"] = "registry") -> dict:
    """JSON Schema of a registry, override or tiles file, for editors."""
    model = {"registry": RegistryFile, "overrides": OverrideFile, "tiles": TilesFile}[kind]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
