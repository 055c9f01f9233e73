"""What stands in the place of a gradient that was taken or parked.

It shows NaN in every element, can be copied and moved with its model, and refuses to be computed with or written to, so nothing goes on
unnoticed: a NaN is below no limit, and clipping by hand would just not clip. Two things it can do, because clipping by total norm consists
of them: it knows the norm of the gradient it stands for, and it takes down a factor to scale it by. So `torch.nn.utils.clip_grad_norm_`,
and every training loop that calls it, works on gradients that are on the disk. When the gradient is not needed any more it can be set to
zero, and is an ordinary gradient of zeros from then on, in one element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchwrap.core import errors
from torchwrap.core.tensors import placeholder

__all__ = ["StandIn"]


class StandIn(torch.Tensor):
    """One NaN expanded to a gradient's shape.

    Attributes:
        what: name of the parameter.
        known: 2-norm of the gradient; `None` if nobody asked for it when it was taken.
        parked: it waits for the step, so it can still be scaled; otherwise an update uses it already.
        factor: what it is to be scaled by; `None` for not at all.

    Exactness: norm and scaled gradient have the bits that the gradient itself would give on the CPU. On other devices `clip_grad_norm_`
        takes norms of several tensors by another kernel if all of them are ordinary, whose last bits may differ.
    """

    what: str
    known: torch.Tensor | None
    parked: bool
    factor: torch.Tensor | None

    @classmethod
    def of(cls, what: str, gradient: torch.Tensor, known: torch.Tensor | None, *, parked: bool) -> StandIn:
        """A stand-in for `gradient`."""
        made: StandIn = placeholder(gradient.shape, gradient.dtype, gradient.device).as_subclass(cls)
        made.what, made.known, made.parked, made.factor = what, known, parked, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            return _KNOWN[func](*args, **kwargs)
        name = str(getattr(func, "__name__", func))
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn)]
        absent = next((leaf for leaf in found if not leaf.is_zero()), None)
        if absent is not None and name not in _SHOWING:
            raise _refused(absent, name)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:  # torch: a written-to element has several places
                raise _refused(found[0], name) from error

    def is_zero(self) -> bool:
        """Whether it was set to zero (`zero_grad(set_to_none=False)`)."""
        with torch._C.DisableTorchFunctionSubclass():
            return bool(self.numel() and self.flatten()[0] == 0)


def _itself(x: StandIn, *_: Any) -> StandIn:
    return x


def _norm(x: Any, ord: float = 2.0, *rest: Any, **options: Any) -> torch.Tensor:
    if not isinstance(x, StandIn) or rest or options:
        with torch._C.DisableTorchFunctionSubclass():
            norm: torch.Tensor = torch.linalg.vector_norm(x, ord, *rest, **options)
            return norm
    if x.is_zero():
        return torch.zeros((), dtype=x.dtype, device=x.device)
    if x.known is None or ord != 2 or x.factor is not None:
        raise _refused(x, f"its {ord:g}-norm")
    return x.known


def _scale(x: Any, factor: Any) -> Any:
    if not isinstance(x, StandIn):
        with torch._C.DisableTorchFunctionSubclass():
            return x.mul_(factor)
    if isinstance(factor, torch.Tensor) and factor.numel() != 1:
        raise _refused(x, "scaling its elements one by one")
    if bool(factor == 1) or x.is_zero():
        return x
    if not x.parked or x.factor is not None:
        raise _refused(x, "scaling it")
    # A number keeps all its digits: as a tensor of the default type it would have those of float32.
    x.factor = factor.clone() if isinstance(factor, torch.Tensor) else torch.tensor(factor, dtype=torch.float64)
    return x


def _norms(tensors: Sequence[Any], ord: float = 2.0) -> list[torch.Tensor]:
    return [_norm(x, ord) for x in tensors]


def _scale_all(tensors: Sequence[Any], factor: Any) -> None:
    factors = factor if isinstance(factor, (list, tuple)) else [factor] * len(tensors)
    for x, each in zip(tensors, factors, strict=True):
        _scale(x, each)


def _norm_of(x: Any, p: Any = "fro", *rest: Any, **options: Any) -> torch.Tensor:
    more = [value for value in (*rest, *options.values()) if value is not None and value is not False]
    if not isinstance(x, StandIn) or more or not (p == "fro" or isinstance(p, int | float)):
        raise _refused(next(leaf for leaf in tree_leaves((x, p, rest, options)) if isinstance(leaf, StandIn)), "this norm")
    return _norm(x, 2.0 if p == "fro" else float(p))


_KNOWN: dict[Any, Callable[..., Any]] = {
    torch.Tensor.detach: _itself,
    torch.Tensor.data.__get__: _itself,  # type: ignore[attr-defined]
    torch.Tensor.norm: _norm_of,
    torch.norm: _norm_of,
    torch.linalg.vector_norm: _norm,
    torch.Tensor.mul_: _scale,
    torch._foreach_norm: _norms,
    torch._foreach_mul_: _scale_all,
}


_NAMES = (
    "__get__ __set__ __delete__ __repr__ __str__ __format__ __deepcopy__ __reduce_ex__ __hash__ __len__ size dim ndimension numel nelement "
    "stride storage_offset element_size is_contiguous is_floating_point is_complex is_signed is_same_size get_device data_ptr storage "
    "untyped_storage is_shared is_pinned is_inference share_memory_ pin_memory requires_grad_ detach_ zero_ _foreach_zero_ as_subclass to "
    "cpu cuda xpu type double float half bfloat16 _has_compatible_shallow_copy_type"
)
_SHOWING = frozenset(_NAMES.split())
"""Names of what asks for no number, or moves and copies it with its model."""


def _refused(gradient: StandIn, what: str) -> errors.ConflictError:
    where = "is on the disk until the step" if gradient.parked else "has been used during backward"
    return errors.ConflictError(
        f"OffloadedOptimizer: the gradient of {gradient.what} {where}; {what} is not possible",
        where=gradient.what,
        fix="Pass max_grad_norm= to clip by total norm, or overlap=False, gradients='host' to keep gradients; with transformers' Trainer "
        "add torchwrap.integrations.transformers.callbacks.OffloadCallback().",
    )
