"""Torch's own attention kernels as back ends: what `F.scaled_dot_product_attention` runs, with its lse, and FlexAttention."""
