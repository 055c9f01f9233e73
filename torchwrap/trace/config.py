"""Settings of `trace`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchwrap.core.config import Config, option
from torchwrap.core.errors import ConfigError

__all__ = ["Trace"]


@dataclass(frozen=True, kw_only=True)
class Trace(Config):
    """Count calls and bytes of a model and its repeated blocks.

    Attributes:
        modules: names of the modules to count; empty means the model and its blocks.
        where: `inside` counts every run of a module's code, recomputation by activation checkpointing included; `outside` counts calls.
    """

    technique: ClassVar[str] = "trace"

    modules: tuple[str, ...] = option((), doc="Names of the modules to count; empty means the model and its repeated blocks.")
    where: str = option(
        "outside", choices=("inside", "outside"), doc="Count runs of the code (recomputation included) or calls from outside."
    )

    def validate(self) -> None:
        """Names must differ."""
        if len(set(self.modules)) != len(self.modules):
            raise ConfigError("a module is named twice", where="Trace.modules")
