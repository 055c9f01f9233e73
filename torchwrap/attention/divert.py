"""Leads a module's calls of `torch.nn.functional.scaled_dot_product_attention` elsewhere, for the length of one call of the module.

The function is a builtin that many libraries hold under names of their own, so it is not rebound anywhere: a `TorchFunctionMode` sees the
calls of the thread that entered it, and nothing remains when the call ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.core.layer import Layer

__all__ = ["Diverted", "FunctionLayer"]


class Diverted(TorchFunctionMode):
    """Within its block, `scaled_dot_product_attention` is computed by a service.

    Args:
        where: name for the record.
        service: who computes it.
    """

    def __init__(self, where: str, service: Service) -> None:
        super().__init__()
        self.where, self.service = where, service

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(self.where, self.service, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class FunctionLayer(Layer):
    """Runs a module with its calls of `scaled_dot_product_attention` led to a service."""

    traceable = False  # Dynamo 2.13 cannot trace Python methods of tensors, such as `unflatten`, under a mode

    def __init__(self, fqn: str, service: Service) -> None:
        self.fqn, self.service = fqn, service

    def replace(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own code under `Diverted`."""
        with Diverted(self.fqn, self.service):
            return call(*args, **kwargs)


def _attend(
    where: str, service: Service, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's own signature; leading dimensions of any number, broadcast as torch does."""
    if query.is_nested or key.is_nested or value.is_nested or query.dim() < 3:
        service.leave(where, "its inputs are nested tensors or have no heads", "Give padded tensors with a mask.")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-3]
    q, k, v = (x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())] for x in (query, key, value))
    rows = max(q.shape[0], k.shape[0])
    q, k, v = (x.expand(rows, -1, -1, -1) for x in (q, k, v))
    mask: TileMask | Tensor | None = attn_mask
    if is_causal:
        mask = TileMask.causal(1, q.shape[2], k.shape[2], q_offset=0, device=q.device)
    elif attn_mask is not None and attn_mask.dim() > 4:
        mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    out = service.attend(where, q, k, v, mask=mask, scale=scale, dropout=dropout_p)
    return out.reshape(*(lead or (() if query.dim() == 3 and rows == 1 else (rows,))), *out.shape[1:])
