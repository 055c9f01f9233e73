"""Settings of `fast_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchwrap.attention.dispatch import BACKENDS
from torchwrap.core.config import Config, option

__all__ = ["FastAttention"]


@dataclass(frozen=True, kw_only=True)
class FastAttention(Config):
    """Lead a model's attention through `torchwrap.attention`.

    Attributes:
        backend: which way of computing attention; a named one that cannot run a call raises.
        fallback: what to do when a call must go to the model's own attention, because it asks for something no back end returns.
        cache: `arena` lets growing caches write in place, `keep` leaves them as they are.
    """

    technique: ClassVar[str] = "fast_attention"

    backend: str = option(
        "auto", choices=("auto", *BACKENDS), doc="Which way of computing attention; a named one that cannot run a call raises."
    )
    fallback: str = option(
        "warn", choices=("warn", "error", "silent"),
        doc="When a call must go to the model's own attention (it asks for attention's weights): warn once per reason, raise, or neither.",
    )  # fmt: skip
    cache: str = option(
        "arena", choices=("arena", "keep"),
        doc="`arena` lets a model's growing caches write new tokens in place instead of copying all tokens for each one.",
    )  # fmt: skip
