"""Exact attention for models as they are: which function computes it, and a cache that grows in place."""
