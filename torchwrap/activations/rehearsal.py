"""What autograd will save of each block, seen by running the model on tensors that have shapes and no memory.

The shapes of weights do not tell what attention keeps for each pair of tokens: nothing with a fused kernel, and probabilities, what they
are divided by and masks of dropout otherwise, each as large as all heads' scores. Which of it a model saves depends on its code, on its
settings, on the device and on torch's choice of a kernel. So a copy of the model whose tensors are fake (shape, type and device) makes a
forward, and hooks on what autograd saves add up the bytes, each piece of memory once. On the models of tests/activations/test_rehearsal.py
the sum is that of a real forward, byte for byte; for causal models of one on a batch with padding, because on shapes transformers
makes the mask that it leaves out where nothing is padded.

Nothing of the model is touched: the copy has none of its hooks, no values are read and no random numbers drawn.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchwrap.activations.choose import Cost
from torchwrap.core.integration import Integration
from torchwrap.core.swap import original_class
from torchwrap.stream.units import Unit

__all__ = ["Rehearsal"]


class Rehearsal:
    """A model's forward in training, on shapes.

    Args:
        model: not wrapped by a technique; parameters may be absent or on `meta`.
        units: of the model.
        device: where it will compute.
        integration: knows what the model is called with.

    Cost: the modules are copied, without their tensors; a forward takes about half a millisecond for each of its operators.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], device: torch.device, integration: Integration) -> None:
        self._mode = FakeTensorMode()
        self._integration, self._device = integration, device
        self._lock = threading.Lock()
        # Configurations stay those of the model: what is set there later (another kind of attention) goes for the copy as well.
        configs = [module.__dict__["config"] for module in model.modules() if "config" in module.__dict__]
        memo: dict[int, Any] = {id(config): config for config in configs}
        with self._mode:
            for tensor in model.parameters():
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad)
            for buffer in model.buffers():
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        self._there = {each.untyped_storage()._cdata for each in memo.values() if isinstance(each, torch.Tensor)}
        self._model: nn.Module = copy.deepcopy(model, memo)
        self._blocks: list[tuple[int, nn.Module]] = [
            (unit.index, memo[id(unit.module)])
            for unit in units
            if unit.kind == "block" and unit.parent is None and unit.module is not None
        ]
        for module in self._model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                hooks.clear()
        self._model.train()

    @classmethod
    def of(cls, model: nn.Module, units: Sequence[Unit], device: torch.device, integration: Integration) -> Rehearsal | None:
        """One for this model if it is known what it is called with and it can be copied; None else, and under other techniques."""
        if integration.inputs(model, batch=1, tokens=2) is None or any(type(each) is not original_class(each) for each in model.modules()):
            return None
        try:
            return cls(model, units, device, integration)
        except Exception:  # whatever a module's own way to be copied raises
            return None

    def costs(self, batch: int, tokens: int) -> list[Cost] | None:
        """What each call of a block saves, in order; times are unknown, 0. None where the forward cannot do without values.

        What several blocks save of one piece of memory counts for the first.
        """
        try:
            with self._lock, _unlogged():
                return self._run(batch, tokens) or None
        except Exception:  # a model that looks at values (data-dependent shapes), or an operator without a rule for shapes
            return None

    def _run(self, batch: int, tokens: int) -> list[Cost]:
        found: list[Cost] = []
        held: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage gets its address meanwhile

        def called(unit: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = len(held)
            with torch.autograd.graph.saved_tensors_hooks(partial(self._saved, held), _same):
                output = forward(*args, **kwargs)
            given = next((each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), 0)
            mine = list(held.values())[before:]
            found.append(Cost(unit, sum(storage.nbytes() for storage in mine), given, 0.0, batch * tokens))
            return output

        for unit, module in self._blocks:
            module.forward = partial(called, unit, type(module).forward.__get__(module))
        try:
            with self._mode, torch.enable_grad():
                given = self._integration.inputs(self._model, batch=batch, tokens=tokens) or {}
                self._model(**{name: tensor.to(self._device) for name, tensor in given.items()})
        finally:
            for _, module in self._blocks:
                del module.forward
        return found

    def _saved(self, held: dict[int, torch.UntypedStorage], tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._there:
            held.setdefault(storage._cdata, storage)
        return tensor


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def _unlogged() -> Iterator[None]:
    """Torch logs an operator without a rule for shapes as an error of the program, with a traceback; not what this thread tries."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)
