"""Ops of a sparse-attention indexer, which picks the tokens that attention looks at."""
