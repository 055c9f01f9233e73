"""Attention for Volta and Turing: CUDA C++ with tensor-core instructions, compiled at run time, tested without a card.

FlashAttention's packages and Triton leave compute capability 7.0 to 7.5 without tensor cores; the kernels here use `mma.m8n8k4` (7.0 and
7.2) and `mma.m16n8k8` (7.5 and, natively, later). What is claimed of them: they compile for these targets, their machine code uses
tensor cores, and the same source run on the host agrees with a float64 reference. Speed has to be measured on a card, see
examples/verify_on_device.py.
"""

from torchwrap.attention.cuda.backend import CudaMma

__all__ = ["CudaMma"]
