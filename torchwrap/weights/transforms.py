"""Refusing calls that would keep weights longer than those are present.

Weights stand in slots that the next block uses again. Whoever records a call to run it later (`torch.jit.trace`, `torch.export`, `make_fx`,
`torch.func.linearize`) would keep the slot and compute with whatever lies there then. Inside `torch.func.grad`, `jvp` and `functionalize`
every tensor that is made belongs to the transform, so what a parameter is given there is dead when it ends, and autograd's hooks on saved
tensors, through which a backward finds weights again, are refused by torch. `torch.vmap` alone does none of this.
"""

from __future__ import annotations

import torch
from torch._C import _functorch

from torchwrap.core import errors

__all__ = ["refuse_transforms"]

_KEEPING = {
    _functorch.TransformType.Grad: "a gradient of torch.func",
    _functorch.TransformType.Jvp: "torch.func.jvp",
    _functorch.TransformType.Functionalize: "torch.func.functionalize",
}
_RECORDING = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def refuse_transforms(name: str) -> None:
    """Raise `ConflictError` if the call of the module of this name is recorded or differentiated by `torch.func`.

    Cost: below a microsecond.
    """
    what: str | None = None
    if _functorch.get_dynamic_layer_stack_depth():
        what = next((_KEEPING[level.key()] for level in _functorch.get_interpreter_stack() or () if level.key() in _KEEPING), None)
    if torch._C._get_tracing_state() is not None:
        what = "torch.jit.trace"
    elif torch.compiler.is_compiling():  # compiled code comes here outside of compiling
        what = "torch.export"
    elif torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(kind) is not None for kind in _RECORDING):
        what = "something that records it (make_fx, torch.func.linearize)"
    if what is not None:
        raise errors.ConflictError(
            f"torchwrap: {name or 'the model'} is called inside {what}, which would keep weights that are present for the call only",
            where=name or "forward",
            fix="Call torchwrap.unwrap(model) first. For derivatives, torch.autograd.grad and torch.autograd.functional work.",
        )
