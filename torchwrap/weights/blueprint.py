"""What can be said of a model before anything is touched: which device computes, what its blocks are, and what follows from a plan."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from torchwrap.activations.choose import Cost
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core import errors
from torchwrap.core.integration import Integration
from torchwrap.stream.planner import ResidencyPlan
from torchwrap.stream.routed import ExpertGroup
from torchwrap.stream.settings import Streaming
from torchwrap.stream.units import Home, UnitMap
from torchwrap.weights.budget import Budget, working_bytes
from torchwrap.weights.copies import Copies
from torchwrap.weights.trial import Trial

__all__ = ["Blueprint", "Working", "blocks_of", "device_of", "refuse_uninitialised"]


@dataclass(slots=True, kw_only=True)
class Blueprint:
    """What `prepare` worked out for `attach`.

    Attributes:
        tier: where streamed weights go beside a separate device; "auto" fills host memory first.
        copies: of weights that matrix products make while everything else is present.
        homes: where the weights of a model built from a folder lie, by parameter name; None for a model in memory.
        rehearsal: tells what blocks will save in training; None where that is not known or not asked for.
        trial: tells what a call like the example takes; None without one.
    """

    division: UnitMap
    plan: ResidencyPlan
    budget: Budget
    device: torch.device
    origin: torch.device
    copies: Copies
    homes: dict[str, Home] | None
    integration: Integration
    tier: Literal["auto", "host", "disk"]
    rehearsal: Rehearsal | None = None
    trial: Trial | None = None
    groups: list[ExpertGroup] = field(default_factory=list)


class Working:
    """`working_bytes` of one model, by batch and tokens; remembers the estimate, not the model.

    Attributes:
        rehearsal: of its training.
        copies: of weights, that are counted in it.
        trial: of calls like an example, where there is one.
    """

    def __init__(
        self, integration: Integration, model: nn.Module, copies: Copies, rehearsal: Rehearsal | None, trial: Trial | None = None
    ) -> None:
        self.trial: Trial | None = trial
        self.rehearsal: Rehearsal | None = rehearsal
        self._known: dict[tuple[int, int], int] = {}
        self.copies: Copies = copies
        self._integration, self._model = integration, weakref.ref(model)

    def __call__(self, batch: int, tokens: int, example: str | None = None) -> int:
        if example is not None and self.trial is not None:
            return self.trial.forward_bytes(example, self.copies)
        key = (batch, tokens)
        model = self._model()
        if model is not None:
            self._known[key] = working_bytes(model, self._integration, batch=batch, tokens=tokens, scratch=self.copies.at(batch * tokens))
        return self._known.get(key, self.copies.at(batch * tokens))

    def costs(self, batch: int, tokens: int) -> list[Cost] | None:
        """What blocks save in a training step; None where only their weights tell."""
        return self.rehearsal.costs(batch, tokens) if self.rehearsal is not None else None


def refuse_uninitialised(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if a parameter has no shape yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise errors.UnsupportedModelError(
                f"{name} is uninitialized, it has no shape yet (a lazy module)",
                where=name,
                fix="Run the model once, then wrap it.",
            )


def device_of(model: nn.Module, config: Streaming, *, from_folder: bool) -> torch.device:
    """The device that computes, as tensors on it name it: the one asked for, else the one the model is on.

    Raises:
        ConfigError: the device asked for is none, or not there.
        UnsupportedModelError: parameters are on meta or on several devices.
    """
    name = config.technique
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "meta" for device in devices):
        empty = next(fqn for fqn, parameter in model.named_parameters() if parameter.device.type == "meta")
        raise errors.UnsupportedModelError(
            f"{name}: {empty} is on meta, so it has no values to stream",
            where=empty,
            fix=f"Load the model from its folder: torchwrap.{name}.from_pretrained(folder).",
        )
    if config.device is not None:
        try:
            asked = torch.device(config.device)
        except RuntimeError as error:
            raise errors.ConfigError(f"{name}: {config.device!r} is no device", where="device", fix='Use "cpu" or "cuda".') from error
        if asked.type not in ("cpu", "cuda"):
            raise errors.ConfigError(f"{name}: computing on {asked} is not supported", where="device", fix='Use "cpu" or "cuda".')
        if asked.type == "cuda" and not torch.cuda.is_available():
            raise errors.ConfigError(f"{name}: there is no {asked}", where="device", fix='Leave device out, or use device="cpu".')
        return _named_by_tensors(asked)
    if from_folder:
        return _named_by_tensors(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if len(devices) > 1:
        raise errors.UnsupportedModelError(
            f"{name}: the parameters are on {', '.join(sorted(map(str, devices)))}",
            where="parameters",
            fix='Say which device computes: device="cuda".',
        )
    return next(iter(devices), torch.device("cpu"))


def _named_by_tensors(device: torch.device) -> torch.device:
    """`cuda` is the current one, and `cpu:0` is `cpu`: two names of one device are not equal."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def blocks_of(model: nn.Module, config: Streaming, integration: Integration) -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks: those the config names, else those the integration knows.

    Raises:
        ConfigError: the config names one that is not there.
    """
    if not config.units:
        return [(block.fqn, block.module) for block in integration.blocks(model) or ()]
    found = [
        (name, module) for name, module in model.named_modules() if name and (name in config.units or type(module).__name__ in config.units)
    ]
    for wanted in config.units:
        if not any(name == wanted or type(module).__name__ == wanted for name, module in found):
            raise errors.ConfigError(
                f"{config.technique}: units names {wanted!r}, which is neither a module nor a class of {type(model).__name__}",
                where="units",
                fix="Take names from [name for name, _ in model.named_modules()].",
            )
    return found
