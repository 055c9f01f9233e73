"""What `torch.func` and tracers do to tensors: whether they are at work, and which tensor lies beneath those that are handed out.

Under `grad` a tensor is wrapped once for each level, and beneath the wrappers it has its numbers. Under `vmap` a tensor stands for one
element of a batch, and nobody can look at the numbers of all elements at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from torchwrap.core.errors import UnsupportedModelError

__all__ = [
    "autograd_allowed",
    "beneath",
    "is_forward_mode",
    "is_mapped",
    "is_traced",
    "keeps_results",
    "makes_others",
    "outside_of_transforms",
    "recorded",
    "transformed",
    "unseen",
]  # fmt: skip

_in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active  # torch's own `autograd.Function` asks the same
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
_mode: Callable[..., object] = torch._C._get_dispatch_mode
_SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")  # torch 2.13
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def transformed() -> bool:
    """Whether the code runs under `torch.func`, or under forward-mode derivatives."""
    return _in_functorch() or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken. For them an operator of Python in a graph gives zeros, and says nothing (torch 2.13)."""
    return forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch.jit.trace records; it knows no operators that take lists of tensors, as masks are."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def recorded() -> bool:
    """Whether what is computed goes into a graph: by torch.compile, torch.export, torch.jit.trace or make_fx.

    Then it has to be an operator of torch: what the native kernels write into memory is in no graph.
    """
    return torch.compiler.is_compiling() or is_traced() or _mode(_PROXY) is not None


def makes_others(like: Tensor) -> bool:
    """Whether a dispatch mode is at work below which new tensors are none of memory, such as that of fake tensors.

    Args:
        like: on the device in question.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    made = like.new_empty(1)
    return type(made) is not Tensor or not made.data_ptr()


def keeps_results() -> bool:
    """Whether selective checkpointing (`create_selective_checkpoint_contexts`) is at work, in a forward or where it is computed again."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    modes = (torch._C._get_dispatch_stack_at(index) for index in range(torch._C._len_torch_dispatch_stack()))
    return any(type(mode).__name__ in _SELECTIVE and type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def unseen() -> AbstractContextManager[object]:
    """A region of whose operators selective checkpointing keeps nothing.

    It gives an operator that is called again what the operator of that name and number returned before. Attention, however, makes and
    looks at a mask once, chooses once how to compute a layout, and writes into memory that operators gave it: computed again it would be
    given the memory of something else.
    """
    return _disable_current_modes() if keeps_results() else contextlib.nullcontext()


def is_mapped(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over the tensor: then nobody can look at its numbers."""
    if torch.compiler.is_compiling() or not _in_functorch():
        return False
    while _is_wrapped(tensor) and not _is_batched(tensor):
        tensor = _unwrapped(tensor)
    return _is_batched(tensor)


def beneath(tensor: Tensor) -> Tensor:
    """The tensor of which `torch.func` made this one: numbers of masks have no gradients, and outlive the transform.

    Raises:
        UnsupportedModelError: `torch.func.vmap` maps over it.
    """
    if not _in_functorch():
        return tensor
    if torch.compiler.is_dynamo_compiling():
        from torchwrap.attention.untraced import untraced  # slow

        found: Tensor = untraced(beneath, tensor)
        return found
    if is_mapped(tensor):
        raise UnsupportedModelError(
            "a mask cannot be made of numbers that torch.func.vmap maps over",
            where="TileMask",
            fix="Give attend a tensor of booleans, which may be mapped over, or map in_dims=None for what the mask is made of.",
        )
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor


@contextlib.contextmanager
def autograd_allowed() -> Iterator[None]:
    """A region in which gradients can be taken by autograd inside an operator, where torch 2.13 keeps it from seeing any call."""
    key = torch._C.DispatchKey.AutogradFunctionality
    hidden = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, hidden)


def outside_of_transforms() -> AbstractContextManager[object]:
    """A region in which `torch.func` does nothing to tensors; those that go in must come from `beneath`."""
    region: AbstractContextManager[object] = torch._C._DisableFuncTorch() if _in_functorch() else contextlib.nullcontext()
    return region
