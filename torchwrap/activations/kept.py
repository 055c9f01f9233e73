"""A tensor that autograd keeps as it is, although hooks took it: they switch off the check that it was not written to."""

from __future__ import annotations

import torch

__all__ = ["Kept", "modified"]


class Kept:
    """A saved tensor that stays where it is, with autograd's check of its version."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # A node that saves its own output and gets it back with its history is a cycle that no collector sees (RMSNorm, sdpa).
        self.tensor: torch.Tensor = tensor.detach() if tensor.grad_fn is not None else tensor
        self.version: int = tensor._version

    def restore(self) -> torch.Tensor:
        """The tensor; raises torch's error if it was written to."""
        if self.tensor._version != self.version:
            raise modified(f"a tensor of type {self.tensor.dtype} and shape {list(self.tensor.shape)}")
        return self.tensor


def modified(what: str) -> RuntimeError:
    """Torch's own error for a saved tensor that was written to."""
    return RuntimeError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: {what} was written to "
        "between forward and backward. Write after backward(), or run the forward again."
    )
