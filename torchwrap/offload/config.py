"""Settings of `offload`: where a model's weights may lie and how much memory they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from torchwrap.core import errors
from torchwrap.core.config import option
from torchwrap.stream.settings import Streaming, state_bytes

__all__ = ["Offload"]


@dataclass(frozen=True, kw_only=True)
class Offload(Streaming):
    """Keep weights on host memory or disk and stream them in while the model runs.

    Example:
        >>> import torchwrap
        >>> torchwrap.Offload(device_memory="1GiB").device_memory
        1073741824
    """

    technique: ClassVar[str] = "offload"
    version: ClassVar[int] = 1

    params: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        doc="Where weights live: auto keeps what the budget allows on the device and the rest as near as possible; "
        "host and disk stream all of them from there; device streams nothing.",
        choices=("auto", "device", "host", "disk"),
    )
    max_unit_bytes: int | str = option(
        512 << 20, doc="Blocks larger than this are streamed child by child.", unit="bytes", size=True, low=1
    )
    tile_above: int | str | None = option(
        None,
        doc="Weights of linear layers larger than this are streamed in blocks of rows of at most that: equal up to rounding.",
        unit="bytes",
        size=True,
        low=1,
    )
    expert_streaming: bool = option(
        True, doc="Experts kept as slices of one parameter: read only those that tokens were routed to (where no gradients are wanted)."
    )
    k: int = option(0, doc="Slots, that is units present at once besides resident ones; 0 chooses.", unit="units", low=0)
    goal: Literal["infer", "train"] = option(
        "infer",
        doc="What `reserve` provides for if it is estimated: forwards, or steps of an OffloadedOptimizer with these `activations`.",
        choices=("infer", "train"),
    )

    def validate(self) -> None:
        """Rules that concern more than one field."""
        if self.activations is None and self.goal == "train":  # what is kept would come on top of weights, gradients and state
            object.__setattr__(self, "activations", "auto")
        super().validate()
        if self.goal == "train":
            state_bytes(self.optimizer, torch.float32)
        if self.params == "device" and (self.device_memory is not None):
            raise errors.ConfigError(
                'offload: params="device" keeps everything on the device, so device_memory cannot bound it',
                where="params",
                fix="Leave one of the two out.",
            )
