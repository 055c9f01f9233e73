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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from torchwrap.activations.choose import Choice, Cost
from torchwrap.activations.live import LiveBytes
from torchwrap.core.example import arguments
from torchwrap.core.integration import Integration
from torchwrap.core.swap import layers_of, original_class
from torchwrap.stream.units import Unit

__all__ = ["Rehearsal"]

_Like = Callable[[torch.Tensor], torch.Tensor]


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

    @classmethod
    def of(
        cls, model: nn.Module, units: Sequence[Unit], device: torch.device, integration: Integration, example: str | None = None
    ) -> Rehearsal | None:
        """One for this model if it is known what it is called with and it can be copied; None else, and under other techniques.

        Args:
            example: of the settings: what the model is called with, see core/example.py.
        """
        known = example is not None or integration.inputs(model, batch=1, tokens=2) is not None
        if not known or any(_is_wrapped(each) for each in model.modules()):
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
                return self._saves(lambda make: ((), self._usual(batch, tokens, make)), batch * tokens) or None
        except Exception:  # a model that looks at values (data-dependent shapes), or an operator without a rule for shapes
            return None

    def _usual(self, batch: int, tokens: int, make: _Like) -> dict[str, torch.Tensor]:
        given = self._integration.inputs(self._model, batch=batch, tokens=tokens)
        if given is None:
            raise ValueError("what the model is called with is not known")
        return {name: make(tensor) for name, tensor in given.items()}

    def saves(self, example: str) -> list[Cost]:
        """The same of a call like the example.

        Raises:
            Exception: whatever the model's forward raises.
        """
        with self._lock, _unlogged():
            return self._saves(partial(arguments, example), 0)

    def forward_bytes(self, example: str) -> int:
        """Most bytes of tensors alive at once in a forward without gradients like the example, its inputs included.

        Raises:
            Exception: whatever the model's forward raises.
        """
        live = LiveBytes(self._there, self._device)
        with self._lock, _unlogged(), self._mode, torch.no_grad(), live:
            self._model.eval()
            args, kwargs = arguments(example, self._like)
            self._model(*args, **kwargs)
        return live.peak

    def step_bytes(self, example: str, modes: Mapping[int, Choice]) -> int:
        """The same of a training forward and its backward, without gradients of parameters.

        Args:
            modes: what becomes of what a block saves, by unit; of others it is kept.

        Raises:
            Exception: whatever the model's forward raises.
        """
        live = LiveBytes(self._there, self._device)

        def taken(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                live.leave_out(parameter.grad)
                parameter.grad = None

        hooks = [parameter.register_post_accumulate_grad_hook(taken) for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            with self._lock, _unlogged(), self._mode, torch.enable_grad(), self._called(partial(_in_mode, modes, self._there)), live:
                self._model.train()
                args, kwargs = arguments(example, self._like)
                loss = _loss(self._model(*args, **kwargs))
                if loss is not None:
                    loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return live.peak

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=self._device)

    @contextmanager
    def _called(self, how: Callable[..., Any]) -> Iterator[None]:
        """Within the context calls of blocks go through `how(unit, forward, *args, **kwargs)`."""
        for unit, module in self._blocks:
            module.forward = partial(how, unit, type(module).forward.__get__(module))
        try:
            yield
        finally:
            for _, module in self._blocks:
                del module.forward

    def _saves(self, given: Callable[[_Like], tuple[tuple[Any, ...], dict[str, Any]]], rows: int) -> list[Cost]:
        found: list[Cost] = []
        held: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage gets its address meanwhile

        def called(unit: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = len(held)
            with torch.autograd.graph.saved_tensors_hooks(partial(self._saved, held), _same):
                output = forward(*args, **kwargs)
            first = next((each.nbytes for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), 0)
            mine = list(held.values())[before:]
            found.append(Cost(unit, sum(storage.nbytes() for storage in mine), first, 0.0, rows))
            return output

        with self._mode, torch.enable_grad(), self._called(called):
            self._model.train()
            args, kwargs = given(self._like)
            self._model(*args, **kwargs)
        return found

    def _saved(self, held: dict[int, torch.UntypedStorage], tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._there:
            held.setdefault(storage._cdata, storage)
        return tensor


def _in_mode(modes: Mapping[int, Choice], known: set[int], unit: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a block whose saved tensors are kept, made again, or away until the backward."""
    mode = modes.get(unit, "keep")
    if mode == "recompute":
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    if mode == "keep":
        return forward(*args, **kwargs)
    back: dict[int, weakref.ref[torch.Tensor]] = {}  # by storage, which is brought back once

    def leave(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata in known:
            return tensor
        return storage._cdata, storage.nbytes(), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.device

    def come(left: Any) -> torch.Tensor:
        if isinstance(left, torch.Tensor):
            return left
        key, nbytes, dtype, shape, stride, offset, device = left
        whole = back[key]() if key in back else None
        if whole is None:
            whole = torch.empty(nbytes, dtype=torch.uint8, device=device)
            back[key] = weakref.ref(whole)
        typed = whole[: nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        typed._whole = whole  # type: ignore[attr-defined]  # as long as anybody has this one
        return typed.as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(leave, come):
        return forward(*args, **kwargs)


def _loss(output: Any) -> torch.Tensor | None:
    """The model's own loss, or a number that needs its outputs and as much again for their gradients."""
    own = getattr(output, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    outputs = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.is_floating_point() and each.requires_grad]
    return sum((each.square().sum() for each in outputs[1:]), outputs[0].square().sum()) if outputs else None


def _is_wrapped(module: nn.Module) -> bool:
    return bool(layers_of(module)) or (type(module) is not original_class(module) and not is_parametrized(module))


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
