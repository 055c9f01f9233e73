"""The techniques under contract, each at its exact setting, or with the tolerance it claims. A new one joins with one line of `TECHNIQUES`.

An exemption names a check that a technique does not pass by design, with the reason; where it has to refuse instead, the exemption
holds the error class, and the check then asserts the refusal. An exemption that is no longer true fails the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests import pairs
from tests.models import FIXTURES, ModelFixture, by_name, select
from tests.weights.budgets import once_for_alike
from torchwrap.core.transaction import inner_model, prepare_all

__all__ = [
    "CHECKS",
    "TECHNIQUES",
    "Case",
    "Exemption",
    "every_model",
    "every_technique",
    "every_two",
    "model_bytes",
    "models",
    "models_named",
    "models_with",
]

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        "gradients": "backward through the model in eval mode",
        "training": "forward and backward in training mode",
        "dropout": "forward and backward in training mode of a model with dropout",
        "stepping": "steps of an ordinary optimizer over the model's parameters",
        "fullgraph": "torch.compile(fullgraph=True) and torch.export",
        "sharded-before": "applied to a model whose parameters FSDP2 has sharded",
        "sharded-after": "FSDP2 on a model to which the technique is applied",
        "replicated-before": "applied to a model inside DistributedDataParallel",
        "replicated-after": "DistributedDataParallel around a model to which the technique is applied",
    }
)


@dataclass(frozen=True)
class Exemption:
    """A check a technique does not pass, why, and the error it must raise there (None: the check has no meaning for it)."""

    reason: str
    raises: type[Exception] | None = None


@dataclass(frozen=True)
class Case:
    """One technique at a setting at which it must be exact; the name is the technique's, or that with a hyphen and a word.

    A technique that is not exact at any setting has a tolerance for each dtype, relative to the largest element. One that is of no use
    for some models says which it needs, and must refuse the others.
    """

    name: str
    config: Callable[[nn.Module], tw.Config]
    exempt: Mapping[str, Exemption] = field(default_factory=dict)
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    needs: Callable[[nn.Module], bool] = lambda model: True

    def __post_init__(self) -> None:
        unknown = set(self.exempt) - set(CHECKS)
        if unknown:
            raise ValueError(f"{self.name}: no such checks: {sorted(unknown)}; there are {sorted(CHECKS)}")

    @property
    def technique(self) -> str:
        """Name of the technique in the registry: that of the case up to the first hyphen."""
        return self.name.partition("-")[0]

    @property
    def callable(self) -> Any:
        """The technique's public callable."""
        return getattr(tw, self.technique)

    def apply(self, model: nn.Module) -> nn.Module:
        """Apply it to `model` at the exact setting."""
        return tw.apply(model, self.config(model))

    @contextmanager
    def expects(self, check: str) -> Iterator[None]:
        """Around the body of a check: asserts the refusal where the case is exempt, skips where there is nothing to assert."""
        assert check in CHECKS
        exemption = self.exempt.get(check)
        if exemption is None:
            yield
        elif exemption.raises is None:
            pytest.skip(exemption.reason)
        else:
            with pytest.raises(exemption.raises):
                yield

    def training(self, dropout: bool) -> str:
        """The check that a test in training mode belongs to, for a model with or without dropout."""
        return "dropout" if dropout and self.passes("training") else "training"

    def passes(self, check: str) -> bool:
        """Whether the case has to pass this check."""
        return check not in self.exempt


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# DistributedDataParallel and FSDP2 write into every parameter when they are made. Absent weights are one element expanded, into which
# torch refuses to write or which it refuses to shard: loud, and before anything is changed. Wrapping comes after them.
OFFLOAD_EXEMPT = {
    "stepping": Exemption("ordinary optimizers write into the parameters, whose weights are absent", tw.ConflictError),
    "fullgraph": Exemption("moving weights is no part of a graph; each block is a graph of its own", RuntimeError),
    "sharded-before": Exemption("FSDP gathers and frees the same weights", tw.ConflictError),
    "sharded-after": Exemption("FSDP shards weights that are absent", NotImplementedError),
    "replicated-after": Exemption("DistributedDataParallel writes into weights that are absent", RuntimeError),
}


def _planned(model: nn.Module, config: tw.Config) -> None:
    """Raise what applying the config would raise, without the work of storing weights."""
    prepare_all(inner_model(model), [config])


@once_for_alike
def _smallest_budget(model: nn.Module) -> tw.Config:
    """`offload` with every unit streamed through as few slots as work; where there is no unit to stream, the smallest budget."""
    config = tw.Offload()
    for params in ("disk", "auto"):
        try:
            _planned(model, tw.Offload(device_memory=1, reserve=0, params=params))
        except tw.BudgetError as error:
            config = tw.Offload(device_memory=error.needed, reserve=0, params=params)
        except tw.TorchwrapError:  # refused whatever the budget, as the test that asked will see
            continue
        try:
            _planned(model, config)
        except tw.TorchwrapError:
            continue
        break
    return config


@once_for_alike
def _small_window(model: nn.Module) -> tw.Config:
    """`superpipeline` with as few of the blocks as overlap; where there are fewer, with all but one, or the one there is."""
    for k in (2, 1):
        try:
            _planned(model, tw.Superpipeline(k=k + 1, k_prime=1))
        except tw.TorchwrapError:
            continue
        return tw.Superpipeline(k=k, k_prime=k)
    return tw.Superpipeline(k=1, k_prime=1)


ATTENTION_EXEMPT = {
    "fullgraph": Exemption("masks of transformers models are made outside graphs; tests/fast_attention has torch's own modules"),
    "dropout": Exemption("dropout of attention draws its numbers in another way"),
}
# Sums in another order: a few units of the last place for each block, of which the fixtures have up to four.
ATTENTION_CLOSE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def _has_attention(model: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in model.modules())


def _attention(model: nn.Module) -> tw.Config:
    if not _has_attention(model):  # a test with a model of its own; fixtures without attention must be refused (conftest.py)
        pytest.skip("the model has no attention")
    return tw.FastAttention()


TECHNIQUES: tuple[Case, ...] = (
    Case("trace", lambda model: tw.Trace()),
    Case("offload", _smallest_budget, OFFLOAD_EXEMPT),
    Case("superpipeline", _small_window, OFFLOAD_EXEMPT),
    Case("fast_attention", _attention, ATTENTION_EXEMPT, ATTENTION_CLOSE, _has_attention),
)

every_technique = pytest.mark.parametrize("case", TECHNIQUES, ids=[case.name for case in TECHNIQUES])


def models(*fixtures: ModelFixture) -> pytest.MarkDecorator:
    """Parametrise over these."""
    return pytest.mark.parametrize("fixture", fixtures, ids=[fixture.name for fixture in fixtures])


every_model = models(*FIXTURES)


def every_two(name: str, values: Mapping[str, object]) -> pytest.MarkDecorator:
    """Techniques, models and `values` of the parameter `name`, each two of which meet, in a third of all combinations of the three.

    For checks of what core does alike for every technique and model. A technique that refuses some models has the place of the first
    in turn, and another one meets what is skipped.
    """
    cases, fixtures = {case.name: case for case in TECHNIQUES}, {fixture.name: fixture for fixture in FIXTURES}
    return pairs.every_two(one_of=3, case=cases, fixture=fixtures, **{name: values})


def models_named(*names: str) -> pytest.MarkDecorator:
    """Parametrise over these fixtures: for checks too slow for all of them."""
    return models(*map(by_name, names))


def models_with(**flags: object) -> pytest.MarkDecorator:
    """Parametrise over the fixtures with these flags."""
    return models(*select(**flags))
