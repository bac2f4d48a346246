"""Mixture-of-experts ops."""
