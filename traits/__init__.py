"""Traits: the vocabulary in which callers, contracts, the registry file and model configs speak of one call.

    trait         Trait: name, type, kind, neutral value; makes a caller's value canonical or refuses it
    dtype         one spelling of each dtype
    platform      machines and patterns of machines; finding out which machine this is
    moe           the traits of routing, which mixture-of-experts ops share
    experts       the traits of the expert layers
    finalize      the traits of what follows them
    indexer       the traits of a sparse-attention indexer's projection
    model_config  a model's published config.json, turned into traits by families.yaml

Nothing here imports the engine, an op, torch or triton; yaml is imported when a model config is read.
"""

if __name__ != "kernel_registry.traits":
    raise ImportError("import kernel_registry.traits, not traits")
