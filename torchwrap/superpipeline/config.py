"""Settings of `superpipeline`: the two knobs, and between which tiers blocks travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torchwrap.core import errors
from torchwrap.core.config import option
from torchwrap.stream.settings import Streaming

__all__ = ["Superpipeline"]


@dataclass(frozen=True, kw_only=True)
class Superpipeline(Streaming):
    """Keep at most `k` blocks where the model computes, and hand their places on in batches of `k_prime`.

    Example:
        >>> import torchwrap
        >>> torchwrap.Superpipeline(k=4, k_prime=2).k
        4
    """

    technique: ClassVar[str] = "superpipeline"
    version: ClassVar[int] = 1

    k: int | Literal["auto"] = option(
        "auto",
        doc='Blocks present at most, those on their way included; as many as there are keeps all. "auto": the smallest number whose '
        "predicted slow-down is at most `max_slowdown`, chosen after the second pass, and never more than memory holds.",
        unit="blocks",
        low=1,
    )
    k_prime: int | Literal["auto"] = option(
        "auto",
        doc='Blocks whose places are given up together and whose successors are requested together, at most `k`. "auto": the fastest.',
        unit="blocks",
        low=1,
    )
    store: Literal["host", "disk"] | None = option(
        None,
        doc="Where blocks lie that are not present; None: host for a separate device, disk on a CPU-only machine.",
        choices=(None, "host", "disk"),
    )
    max_slowdown: float = option(
        1.10,
        doc='Time of a pass with k="auto", as a multiple of that with all blocks present; in training of a forward and its backward.',
        unit="ratio",
        low=1.0,
        high=1000.0,
    )
    train: bool | None = option(
        None,
        doc="Whether memory and time are those of training: then `reserve`, if it is estimated, leaves room for a backward and an "
        'OffloadedOptimizer from the start, and "auto" measures a forward with its backward. None: a pass is one of training if the model '
        'is in training mode and gradients are wanted and a backward follows; the room is then left when "auto" chooses.',
    )

    @property
    def chooses(self) -> bool:
        """Whether there is a knob to choose after measuring a pass."""
        return self.k == "auto" or (self.k_prime == "auto" and self.k != 1)

    def validate(self) -> None:
        """Rules that concern more than one field."""
        if self.activations is None and self.train:  # what is kept would come on top of weights, gradients and state
            object.__setattr__(self, "activations", "auto")
        super().validate()
        for name, value in (("k", self.k), ("k_prime", self.k_prime)):
            if isinstance(value, bool):
                raise errors.ConfigError(f"superpipeline: {name}={value}", where=name, fix='Give a number of blocks, or "auto".')
        if isinstance(self.k, int) and isinstance(self.k_prime, int) and self.k_prime > self.k:
            raise errors.ConfigError(
                f"superpipeline: a batch of k_prime={self.k_prime} blocks, but only k={self.k} are present at once",
                where="k_prime",
                fix=f"Use k_prime from 1 to {self.k}.",
            )
