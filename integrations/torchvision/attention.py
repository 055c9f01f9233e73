"""Leads the windowed attention of torchvision's Swin transformers through `torchwrap.attention`.

`shifted_window_attention` (torchvision 0.28) is a function that the modules call, so the modules' code is replaced: windows are the batch,
the relative positions of a window's places are a bias that all windows share, and what a shift brings together from opposite edges of
the picture must not see each other. torchvision adds -100 to such scores; here each place has the number of its region, and only places
of equal number see each other, so no mask of places times places is made.
Source: Z. Liu et al., "Swin Transformer", 2021, section 3.2; cosine attention: "Swin Transformer V2", 2022, section 3.2.

Letters: B pictures, H and W height and width, C channels, M places of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.core.integration import AttentionRoute
from torchwrap.core.layer import Layer
from torchwrap.core.swap import original_class

__all__ = ["WindowLayer", "route"]

WINDOWED = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")


def route(model: nn.Module, service: Service, prefix: str = "") -> AttentionRoute:
    """Layers for the windowed attention modules of `model`."""
    found = AttentionRoute()
    for fqn, module in model.named_modules(prefix=prefix):
        kind = original_class(module)
        if kind.__name__ in WINDOWED and kind.__module__.startswith("torchvision."):
            found.places.append((fqn, module, WindowLayer(fqn, service)))
            found.attends.append(fqn)
    if found.attends:
        found.notes.append(f"{len(found.attends)} modules of windowed attention")
    return found


class WindowLayer(Layer):
    """The code of `ShiftedWindowAttention` and of its second version, with attention of ours."""

    def __init__(self, fqn: str, service: Service) -> None:
        self.fqn: str = fqn
        self.service: Service = service

    def replace(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """As the module's `forward`: pictures (B, H, W, C) to the same shape."""
        return self._run(module, *args, **kwargs)

    def _run(self, module: Any, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = module.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        down, across = x.shape[1] // rows, x.shape[2] // columns
        # A window as large as the picture is not shifted.
        shift = (0 if down <= 1 else module.shift_size[0], 0 if across <= 1 else module.shift_size[1])
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        windows = _windows(x, rows, columns).reshape(batch * down * across, rows * columns, channels)
        q, k, v, scale = _projected(module, windows)
        mask = None
        if any(shift):
            # Kept are tensors that hold numbers for everybody.
            plain = not torch.compiler.is_compiling() and not _modes()
            mask = (_kept if plain else _mask)(batch, x.shape[1], x.shape[2], (rows, columns), shift, x.device)
        dropout = module.attention_dropout if module.training else 0.0
        out = self.service.attend(self.fqn, q, k, v, mask=mask, bias=module.get_relative_position_bias(), scale=scale, dropout=dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)
        out = F.dropout(out, p=module.dropout, training=module.training)
        x = out.view(batch, down, across, rows, columns, channels).transpose(2, 3).reshape(x.shape)
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return x[:, :height, :width].contiguous()


def _mask(batch: int, height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> TileMask:
    """Which places of the windows of a shifted picture see each other."""
    with torch.inference_mode(False):
        rows, columns = window
        regions = _windows(_regions(height, width, window, shift, device)[None, :, :, None], rows, columns)
        regions = regions.reshape(-1, rows * columns).repeat(batch, 1)
        return TileMask(len(regions), rows * columns, rows * columns, q_segments=regions, k_segments=regions)


_kept = functools.lru_cache(maxsize=16)(_mask)  # chosen: stages of a network that have shifted windows are two to four
_modes = torch._C._len_torch_dispatch_stack  # torch 2.13: such as that of fake tensors


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, H, W, C) as (B, windows down, windows across, rows, columns, C)."""
    batch, height, width, channels = x.shape
    return x.view(batch, height // rows, rows, width // columns, columns, channels).transpose(2, 3)


def _regions(height: int, width: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """The number of each place's region after the shift, int32 (H, W): three bands down times three across."""
    bands = []
    for length, size, moved in zip((height, width), window, shift, strict=True):
        place = torch.arange(length, device=device)
        bands.append((place >= length - size).int() + (place >= length - moved).int() if moved else torch.zeros_like(place).int())
    return bands[0][:, None] * 3 + bands[1][None, :]


def _projected(module: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v (windows, heads, M, D) and the factor of the scores."""
    bias, logit_scale = module.qkv.bias, getattr(module, "logit_scale", None)
    if logit_scale is not None and bias is not None:  # the second version has no bias on keys, whatever is stored there
        third = bias.numel() // 3
        bias = torch.cat([bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]])
    qkv = F.linear(windows, module.qkv.weight, bias).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    if logit_scale is None:
        return q, k, v, q.shape[-1] ** -0.5
    q = F.normalize(q, dim=-1) * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    return q, F.normalize(k, dim=-1), v, 1.0
