"""Leads calls of `torch.nn.functional.scaled_dot_product_attention` elsewhere, for the length of a block or of one call of a module.

The function is a builtin that many libraries hold under names of their own, so it is not rebound anywhere: a `TorchFunctionMode` sees the
calls of the thread that entered it, and nothing remains when the block ends, however it ends. While a mode works it sees nothing itself,
and torch's functions in Python that call it are such work: their code is run with other names.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.attention.transforms import unseen
from torchwrap.core.errors import ConfigError
from torchwrap.core.layer import Layer
from torchwrap.core.swap import original_class

__all__ = ["Diverted", "FunctionLayer"]


class _Working(threading.local):
    """Whether a service computes a call of this thread: what a back end calls is its own business, whatever blocks are around."""

    now: bool = False


_working = _Working()


class Diverted(TorchFunctionMode):
    """Within its block, `scaled_dot_product_attention` is computed by a service.

    Args:
        where: name for the record.
        service: who computes it.
        again: whether what is checkpointed inside of the block is computed again inside of it, too; else torch computes it both times.
    """

    def __init__(self, where: str, service: Service, *, again: bool = True) -> None:
        super().__init__()
        self.where, self.service = where, service
        self.called = False
        self._around: Any = None if again else (_hooks(True),)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _working.now:
            return func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        if func in _PYTHON:
            with self:
                return _not_asking(func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `scaled_dot_product_attention`, by the service."""
        self.called = True
        _working.now = True
        try:
            if self._around is not None and _checkpoints(hooks := _hooks(True)) and hooks != self._around[0]:
                self.service.leave(
                    self.where, "it is checkpointed inside of the module, and computed again outside of it", "Checkpoint the module."
                )
                return F.scaled_dot_product_attention(*args, **kwargs)
            return _attend(self.where, self.service, *args, **kwargs)
        finally:
            _working.now = False


_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # torch 2.13


def _checkpoints(hooks: Any) -> bool:
    """Whether these hooks for saved tensors, the innermost, are those of a checkpoint's forward (torch 2.13)."""
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook.")


class FunctionLayer(Layer):
    """Runs a module with its calls of `scaled_dot_product_attention` led to a service.

    Args:
        fqn: name of the module.
        service: who computes them.
        switch: name of an attribute that the module's code asks whether to call it, and that is false; empty: there is none.
    """

    traceable = False  # Dynamo 2.13 cannot trace Python methods of tensors, such as `unflatten`, under a mode

    def __init__(self, fqn: str, service: Service, switch: str = "") -> None:
        self.fqn: str = fqn
        self.service: Service = service
        self.switch: str = switch

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own code under `Diverted`."""
        if self.switch:
            setattr(module, self.switch, True)
        try:
            with Diverted(self.fqn, self.service, again=False) as inside:
                out = call(*args, **kwargs)
        finally:
            if self.switch:
                setattr(module, self.switch, False)
        if not inside.called:
            self.service.leave(
                self.fqn,
                f"the code of {original_class(module).__name__} took a way without scaled_dot_product_attention",
                "If it has a setting for that function, switch it on.",
            )
        return out


_BROADCAST = "its inputs do not have the shapes and the dtype of one attention, and torch broadcasts them", "Expand them before the call."


# Python functions of torch that ask for a mode themselves: what they call would be work of the mode, and not seen by it. Backward is
# one, because it computes checkpointed code once more.
_PYTHON: frozenset[Any] = frozenset({F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad})


@functools.cache
def _not_asking(function: Any) -> Callable[..., Any]:
    """The function without its question whether there is a mode."""
    names = {name: value for name, value in function.__globals__.items() if not name.startswith("has_torch_function")}
    asking = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    made = FunctionType(function.__code__, {**names, **dict.fromkeys(asking, _no)}, None, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _no(*_: Any) -> bool:
    return False


@functools.lru_cache(maxsize=64)
def _causal(rows: int, columns: int, device: torch.device) -> TileMask:
    """torch's `is_causal`; the same one for all layers."""
    return TileMask.causal(1, rows, columns, q_offset=0, device=device)


def _attend(
    where: str, service: Service, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's own signature; leading dimensions of any number, broadcast as torch does. What does not fit is torch's error."""

    def own(reason: str, fix: str) -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        service.leave(where, reason, fix)
        return out

    if query.is_nested or key.is_nested or value.is_nested or query.dim() < 3:
        return own("its inputs are nested tensors or have no heads", "Give padded tensors with a mask.")
    if is_causal and attn_mask is not None:
        return own("it is given a mask and is_causal", "Give one of them.")
    if not query.dim() == key.dim() == value.dim() or (not enable_gqa and key.shape[-3] not in (1, query.shape[-3])):
        return own(*_BROADCAST)
    lead: Sequence[int] = query.shape[:-3]
    q, k, v = query, key, value
    mask: TileMask | Tensor | None = attn_mask
    try:
        if not lead == key.shape[:-3] == value.shape[:-3]:
            lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
            q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))
        if len(lead) != 1:
            q, k, v = (x.flatten(0, -4) if lead else x[None] for x in (q, k, v))
            if attn_mask is not None and attn_mask.dim() > 3:
                mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    except RuntimeError:
        return own(*_BROADCAST)
    if is_causal:
        with unseen():
            mask = _causal(q.shape[2], k.shape[2], q.device)
    try:
        out = service.attend(where, q, k, v, mask=mask, scale=scale, dropout=dropout_p)
    except ConfigError:
        return own(*_BROADCAST)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])
