"""Many batches through one streamed model, unit by unit: each unit is read once for all of them.

When reading takes longer than computing, a pass costs the same for one batch and for eight. Each batch runs the model's own forward (or
`generate`) in a thread of its own; the engine lets them through the units together, see stream/turns.py, and only one computes at a time.
Results are those of one call after another, bit for bit, as long as the calls do not depend on each other. Autograd numbers its nodes
for each thread by itself, so one backward for the outputs of several calls adds up what they give to a weight in another order.

Random numbers have no common order here, so every batch has its own: those that follow `torch.manual_seed(seeds[i])`.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.swap import layers_of
from torchwrap.core.technique import Handle
from torchwrap.core.transaction import handle_of, wrappers_of
from torchwrap.stream.engine import Engine
from torchwrap.stream.threadstate import ThreadState
from torchwrap.weights.attributes import Assigned, Attributes, put
from torchwrap.weights.layers import UnitLayer

__all__ = ["ManyCalls", "forward_many", "generate_many"]

_OF_ONE_BATCH = ("past_key_values", "cache_params", "streamer")
"""Arguments of `generate` that hold the state of one call."""


class ManyCalls(Handle):
    """The part of a handle that runs several batches at once.

    Attributes:
        root: the model.
    """

    engine: Engine | None
    device: torch.device
    root: weakref.ref[nn.Module] | None = None

    def forward_many(
        self, inputs: Sequence[Any], *, max_batches_in_flight: int | None = None, seeds: Sequence[int] | None = None
    ) -> list[Any]:
        """What the model returns for each of `inputs`, in their order; weights are read once for all.

        Args:
            inputs: for each call a mapping (keywords), a tuple or list (positional arguments), or anything else (the only argument).
            max_batches_in_flight: calls under way at once; what they compute on the way lives at once. None: all.
            seeds: one per call; by default drawn from torch's generator, which is left alone if no call uses it.

        Raises:
            ConfigError: `inputs` are not several, no batch may be in flight, or the seeds are not integers, one per input.
            ConflictError: called inside a forward of this model, a dispatch mode, or a transform of torch.func.
            BaseException: what the first call that failed raised; the others are ended.

        Exactness: bit-identical to one call after another, call i after `torch.manual_seed(seeds[i])`. So are the gradients of a backward
            for each output; those of one backward for several outputs are equal up to rounding (see docs/offload.md, Many batches).
        Cost: one pass of reading; rows of embedding tables are read for each call. Activations and caches of all calls in flight.
        """
        return _run(self, self._model(), inputs, max_batches_in_flight, seeds, "forward_many")

    def generate_many(
        self,
        inputs: Sequence[Any],
        *,
        max_batches_in_flight: int | None = None,
        seeds: Sequence[int] | None = None,
        **generation: Any,
    ) -> list[Any]:
        """What the model's `generate` returns for each of `inputs`, in their order; each call has its own cache.

        Args:
            inputs: as for `forward_many`; what a mapping says goes before `generation`.
            max_batches_in_flight: as for `forward_many`; a call that ends makes room for the next.
            seeds: as for `forward_many`.
            **generation: arguments of every call.

        Raises:
            UnsupportedModelError: the model has no `generate`.
            ConfigError, ConflictError, BaseException: as `forward_many`; also an argument for all calls that can serve one only.

        Exactness: bit-identical to one call after another, sampled too: call i after `torch.manual_seed(seeds[i])`.
        Cost: as long as all calls generate, one pass of reading for a token of each.
        """
        return _generate(self, self._model(), inputs, max_batches_in_flight, seeds, generation)

    def _model(self) -> nn.Module:
        model = self.root() if self.root is not None else None
        if model is None:
            raise errors.NotAppliedError("torchwrap: this handle has no model any more")
        return model


def forward_many(
    model: nn.Module, inputs: Sequence[Any], *, max_batches_in_flight: int | None = None, seeds: Sequence[int] | None = None
) -> list[Any]:
    """`ManyCalls.forward_many` of the model's handle.

    Raises:
        NotAppliedError: the model is not offloaded.
        ConfigError, ConflictError, BaseException: as there.

    Example:
        >>> import torch, torchwrap
        >>> from torchwrap.weights.many import forward_many
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8))).eval()
        >>> model = torchwrap.offload(model, device_memory=50_000)
        >>> batches = [torch.ones(2, 64), torch.zeros(1, 64)]
        >>> [tuple(output.shape) for output in forward_many(model, batches)]
        [(2, 64), (1, 64)]
    """
    return _run(_handle(model), model, inputs, max_batches_in_flight, seeds, "forward_many")


def generate_many(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    max_batches_in_flight: int | None = None,
    seeds: Sequence[int] | None = None,
    **generation: Any,
) -> list[Any]:
    """`ManyCalls.generate_many` of the model's handle.

    Raises:
        NotAppliedError: the model is not offloaded.
        UnsupportedModelError, ConfigError, ConflictError, BaseException: as there.
    """
    return _generate(_handle(model), model, inputs, max_batches_in_flight, seeds, generation)


def _handle(model: nn.Module) -> ManyCalls:
    for name in wrappers_of(model):
        handle = handle_of(model, name)
        if isinstance(handle, ManyCalls):
            return handle
    found: ManyCalls = handle_of(model, "offload")  # raises, and says what is applied
    return found


def _generate(
    handle: ManyCalls,
    model: nn.Module,
    inputs: Sequence[Any],
    limit: int | None,
    seeds: Sequence[int] | None,
    generation: Mapping[str, Any],
) -> list[Any]:
    call = getattr(model, "generate", None)
    if not callable(call):
        raise errors.UnsupportedModelError(
            f"generate_many: {type(model).__name__} has no generate()", where=type(model).__name__, fix="Use forward_many."
        )
    for name in _OF_ONE_BATCH:
        if generation.get(name) is not None:
            raise errors.ConfigError(
                f"generate_many: one {name} for all calls would mix them up", where=name, fix=f'Give each call its own: {{"{name}": ...}}.'
            )
    return _run(handle, model, inputs, limit, seeds, "generate_many", call, generation)


def _run(
    handle: ManyCalls,
    model: nn.Module,
    inputs: Sequence[Any],
    limit: int | None,
    seeds: Sequence[int] | None,
    what: str,
    call: Callable[..., Any] | None = None,
    common: Mapping[str, Any] | None = None,
) -> list[Any]:
    inputs = _several(inputs, what)
    if limit is not None and not (isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1):
        raise errors.ConfigError(f"{what}: max_batches_in_flight={limit!r}", where="max_batches_in_flight", fix="Use at least 1, or None.")
    seeds = _seeds(seeds, len(inputs), what) if seeds is not None else None
    if not inputs:
        return []
    state = ThreadState(what)
    draws = _Draws(handle.device)
    chosen = list(seeds) if seeds is not None else draws.seeds(len(inputs))
    made = [
        _Call(call or model, *_arguments(given, common or {}), seed, draws, state, f"batch {index} of {what}")
        for index, (given, seed) in enumerate(zip(inputs, chosen, strict=True))
    ]
    try:
        if handle.engine is None:
            return [each.alone() for each in made]
        with handle.engine.in_turns() as turns:
            attributes = Attributes(model, _unit_modules(model, handle))
            for each in made:
                each.attributes = attributes
            results = turns.run(made, limit or len(made))
            put(made[-1].assigned)  # what the last of them would have left
            return results
    finally:
        draws.end(used=seeds is None and any(each.drew for each in made))


def _several(inputs: Any, what: str) -> list[Any]:
    """The inputs of all calls: a sequence, or whatever is iterated over once; not one input by itself."""
    if isinstance(inputs, Iterable) and not isinstance(inputs, torch.Tensor | Mapping | str | bytes):
        return list(inputs)
    raise errors.ConfigError(
        f"{what}: inputs are one {type(inputs).__name__}, not a list with one entry per call",
        where="inputs",
        fix="Give a list: [first, ...].",
    )


def _seeds(seeds: Any, count: int, what: str) -> list[int]:
    try:
        numbers: list[int] | None = [operator.index(seed) for seed in seeds]
    except TypeError:
        numbers = None
    if numbers is None or not all(-(2**63) <= number < 2**64 for number in numbers):
        raise errors.ConfigError(f"{what}: seeds={seeds!r} are not integers of 64 bits", where="seeds", fix="Give one integer per input.")
    if len(numbers) != count:
        raise errors.ConfigError(f"{what}: {len(numbers)} seeds for {count} inputs", where="seeds", fix="Give one seed per input.")
    return numbers


def _arguments(given: Any, common: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), {**common, **given}
    if type(given) in (tuple, list):
        return tuple(given), dict(common)
    return (given,), dict(common)


def _unit_modules(model: nn.Module, handle: ManyCalls) -> dict[int, nn.Module]:
    return {
        layer.unit: module
        for module in model.modules()
        for layer in layers_of(module)
        if isinstance(layer, UnitLayer) and layer.handle is handle
    }


class _Draws:
    """Torch's own generators: of the CPU, and of the device that computes."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._before = self._after = self.now()

    def seeds(self, count: int) -> list[int]:
        """Seeds that the next draws would give."""
        drawn: list[int] = torch.randint(2**63 - 1, (count,), device="cpu").tolist()
        self._after = self.now()
        return drawn

    def now(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]

    def set(self, states: Sequence[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def seed(self, seed: int) -> list[torch.Tensor]:
        for generator in self._generators:
            generator.manual_seed(seed)
        return self.now()

    def end(self, *, used: bool) -> None:
        """Leave the generators as they were, or behind the seeds if those were `used`."""
        self.set(self._after if used else self._before)


class _Call:
    """One call of the model or its `generate`; a `stream.turns.Job`.

    Attributes:
        attributes: of the model, when calls take turns.
        assigned: those that this call set, while others run and after its end.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seed: int,
        draws: _Draws,
        state: ThreadState,
        name: str,
    ) -> None:
        self._call, self._args, self._kwargs = call, args, kwargs
        self._seed, self._draws, self._state, self._name = seed, draws, state, name
        self._first: list[torch.Tensor] = []
        self._random: list[torch.Tensor] = []
        self.attributes: Attributes | None = None
        self.assigned: Assigned = []

    @property
    def drew(self) -> bool:
        """Whether it used random numbers."""
        return not all(torch.equal(a, b) for a, b in zip(self._random, self._first, strict=True))

    def run(self) -> Any:
        self._first = self._draws.seed(self._seed)
        return self._state.run(self._made)

    def alone(self) -> Any:
        """The call in the present thread."""
        self._first = self._draws.seed(self._seed)
        try:
            return self._made()
        finally:
            self.suspend(())

    def suspend(self, units: Sequence[int]) -> None:
        self._random = self._draws.now()
        if self.attributes is not None:
            self.assigned = self.attributes.take(units, self.assigned)

    def resume(self) -> None:
        self._draws.set(self._random)
        put(self.assigned)

    def _made(self) -> Any:
        try:
            return self._call(*self._args, **self._kwargs)
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"in {self._name}")
            raise
