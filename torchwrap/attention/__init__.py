"""Attention as a function of tensors: one contract, a mask that is never stored, and several ways to compute the same numbers."""
