"""Attention on CPUs, composed of calls of torch's fused kernel so that no key is read that no query sees, and no mask is stored."""
