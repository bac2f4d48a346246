"""indexer.wk_weights_proj: see contract.py."""
