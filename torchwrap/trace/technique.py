"""`trace`: how often modules run, with how many bytes of input and output, and how many calls failed.

Counting in a compiled graph must not read a Python number that changes, or Dynamo would compile every call anew. So each layer keeps
a tensor, which a graph updates in place like any other, and eager calls add to it under a lock.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Literal, cast

import torch
from torch import nn

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import Integration
from torchwrap.core.layer import Layer
from torchwrap.core.order import PHASES
from torchwrap.core.technique import Handle, Place, Prepared, Technique, register
from torchwrap.trace.config import Trace

__all__ = ["TraceHandle", "TraceLayer", "TraceTechnique", "trace"]

_lock = threading.Lock()


class TraceLayer(Layer):
    """Counts one module; returns everything as it came."""

    name = "trace"

    def __init__(self, where: Literal["inside", "outside"]) -> None:
        self.where: Literal["inside", "outside"] = where
        # calls, bytes in, bytes out, failures. On the CPU, also for a model elsewhere: a graph may update it there too.
        self.counts: torch.Tensor = torch.zeros(4, dtype=torch.int64, device="cpu")

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._add((1, tensor_bytes_in(args) + tensor_bytes_in(kwargs), 0, 0))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._add((0, 0, tensor_bytes_in(output), 0))
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        self._add((0, 0, 0, 1))

    def _add(self, amounts: tuple[int, int, int, int]) -> None:
        if torch.compiler.is_compiling():
            _add_in_graph(self.counts, amounts)
        else:
            _add_eagerly(self.counts, amounts)


def _add_in_graph(counts: torch.Tensor, amounts: tuple[int, int, int, int]) -> None:
    if is_exporting():  # an exported program has no layer to report to
        return
    with torch.no_grad():
        for index, amount in enumerate(amounts):
            if not isinstance(amount, int) or amount:
                counts[index].add_(amount)


def _add_eagerly(counts: torch.Tensor, amounts: tuple[int, int, int, int]) -> None:
    numbers = counts.numpy()  # not a torch call, so that modes and tracers the user has entered do not see it
    with _lock:
        numbers += amounts


def is_exporting() -> bool:
    """True inside `torch.export` (a question torch has answered since 2.7)."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return bool(asked()) if asked is not None else False


def tensor_bytes_in(value: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes_in(item) for item in value.values())
    if isinstance(value, tuple | list):
        return sum(tensor_bytes_in(item) for item in value)
    return 0


class TraceHandle(Handle):
    """What was counted so far."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places

    def stats(self) -> dict[str, Any]:
        """`{module name: {"calls", "bytes_in", "bytes_out", "failed"}}`; the model itself is named by the empty string."""
        names = ("calls", "bytes_in", "bytes_out", "failed")
        return {fqn: dict(zip(names, cast(TraceLayer, layer).counts.tolist(), strict=True)) for fqn, _, layer in self._places}

    def explain(self) -> str:
        """One line per module."""
        return "\n".join(
            f"{fqn or '(model)'}: " + ", ".join(f"{amount} {name.replace('_', ' ')}" for name, amount in counts.items())
            for fqn, counts in self.stats().items()
        )


class TraceTechnique(Technique[Trace]):
    """Counts calls and bytes without any effect on numbers.

    Exactness: bit-identical. Cost: one counter of 32 bytes per counted module.

    Example:
        >>> import torch, torchwrap as tw
        >>> model = tw.trace(torch.nn.Linear(2, 2))
        >>> _ = model(torch.ones(3, 2))
        >>> tw.handle_of(model, "trace").stats()[""]["calls"]
        1
        >>> _ = tw.unwrap(model)
    """

    name = "trace"
    phase: ClassVar[int] = PHASES["trace"]
    config_class = Trace
    exactness = "bit-identical"

    def prepare(self, model: nn.Module, config: Trace, integration: Integration) -> Prepared[Trace]:
        known = dict(model.named_modules())
        names = config.modules or ("", *_block_names(model, integration))
        for name in names:
            if name not in known:
                raise UnsupportedModelError(f"the model has no module {name!r}", where="Trace.modules")
        where = cast(Literal["inside", "outside"], config.where)
        return Prepared(config=config, layers=[(name, known[name], TraceLayer(where)) for name in names])

    def attach(self, model: nn.Module, prepared: Prepared[Trace]) -> TraceHandle:
        return TraceHandle(prepared.layers)


def _block_names(model: nn.Module, integration: Integration) -> list[str]:
    try:
        return [block.fqn for block in integration.blocks(model) or ()]
    except UnsupportedModelError:  # a part of a model, or a family without repeated blocks: the whole is counted
        return []


trace: TraceTechnique = register(TraceTechnique())
