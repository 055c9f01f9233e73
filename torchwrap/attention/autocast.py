"""`torch.autocast` and attention: inputs are cast as torch casts them for its own, and nothing inside is cast again.

Back ends choose the dtypes of their products themselves; autocast would turn sums in float32 into halves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast", "exact_dtypes"]


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of autocast where it is on; float64 stays as it is."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # torch 2.13: one question for all devices
        return q, k, v
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return q, k, v  # the contract refuses them by name
    device = q.device.type
    if not _is_on(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(q), cast(k), cast(v)


def exact_dtypes(like: Tensor) -> AbstractContextManager[object]:
    """A region in which autocast casts nothing."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


def _is_on(device: str) -> bool:
    # torch 2.13 raises for devices that have no autocast, such as "meta".
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
