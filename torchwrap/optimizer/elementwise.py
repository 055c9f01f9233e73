"""Running an optimizer class of the user on a piece of a parameter.

Most optimizers treat every element by itself: the new value of a weight follows from its gradient, its own state and numbers that are the
same for all. Such a class may be run on any part of a parameter, and the bits are those of running it on the whole, because it is the
same code with the same kernels. So nothing is reimplemented here: the class itself is instantiated on flat views. What it keeps per
element (momenta) is told apart from what it keeps per parameter (a step count) by shape, and whether it is elementwise at all is found out
by trying: a small tensor whole against the same tensor in parts.

Source of updating state in parts while the rest is elsewhere: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme
Scale Deep Learning", 2021, section 5.2.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from torchwrap.core import errors

__all__ = ["Rule", "plain_step", "scaled", "scaling_of", "settings_of", "step_of"]

_SCALING = ("grad_scale", "found_inf")  # what a GradScaler sets on an optimizer whose kernels divide by the scale (torch 2.13, fused=True)

_WAY_OUT = (
    "Use a class that treats elements one by one (SGD, Adam, AdamW, Adagrad, RMSprop, ...), or give this one the parameters that stay in "
    "memory (pin=) as an ordinary optimizer of its own."
)
_NOT_ELEMENTWISE = {
    "LBFGS": "it looks at all parameters at once and evaluates the loss several times",
    "Adafactor": "it keeps statistics of rows and columns",
    "Muon": "it orthogonalises whole matrices",
    "SparseAdam": "it works on sparse gradients",
}
_CUTS = (0, 128, 640)  # where the parts of the tensors tried begin: inside a row, at multiples of BLOCK
_TRIED = (  # shapes, and scales of gradients
    ((29, 37), 1.0),
    ((29, 37), 1e-6),  # some classes do something to the whole only if gradients are large, or small,
    ((29, 37), 1e6),
    ((130, 133), 1.0),  # or the tensor is (factors from 128 rows and columns on, state in 8 bits from 4096 elements on),
    ((5, 11, 17), 1.0),  # or to kernels of convolutions only (centralised gradients)
    ((7, 5, 5, 7), 1.0),
)
_STEPS = 4  # some classes take a different way in the first steps (momentum, rectification)


class Rule:
    """One optimizer class with its options.

    Args:
        cls: a subclass of `torch.optim.Optimizer`.
        options: its keywords, without parameters.

    Attributes:
        template: an instance on a stand-in, for its defaults.

    Raises:
        ConfigError: the class is known not to be elementwise, or its constructor refuses the options.
    """

    def __init__(self, cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            given = f"an object of class {type(cls).__name__}" if isinstance(cls, torch.optim.Optimizer) else repr(cls)
            raise errors.ConfigError(
                f"OffloadedOptimizer: {given} is no optimizer class",
                where="optimizer",
                fix="Pass the class and its settings: OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3).",
            )
        reason = _NOT_ELEMENTWISE.get(cls.__name__)
        if reason is not None:
            raise errors.ConfigError(f"OffloadedOptimizer: {cls.__name__} cannot be offloaded: {reason}", where="optimizer", fix=_WAY_OUT)
        self.cls: type[torch.optim.Optimizer] = cls
        self.options: dict[str, Any] = dict(options)
        self.template: torch.optim.Optimizer = cls([torch.zeros(2)], **options)
        if self.template.defaults.get("differentiable"):
            raise errors.ConfigError(
                "OffloadedOptimizer: differentiable=True keeps every step in the graph", where="differentiable", fix="Leave it out."
            )
        self._begins = bool(self.template.state)  # it keeps something before the first step
        self._known: dict[tuple[str, torch.dtype, str], dict[str, torch.dtype]] = {}

    def step(
        self, settings: Mapping[str, Any], weight: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Update `weight` in place, as the class itself would.

        Args:
            settings: of the parameter's group, with what `scaling_of` gave.
            weight: (n,), changed in place.
            gradient: (n,), not changed.
            state: what an earlier step gave; tensors in it are changed in place. Empty for the first step.

        Returns:
            The state afterwards; tensors of it may be those of `state` or new ones.
        """
        weight = weight.detach()
        scaling = {name: settings[name] for name in _SCALING if name in settings}
        weight.grad = gradient.clone() if scaling else gradient  # which would be divided where it is, and again if the step is repeated
        inner = self.cls([{**{k: v for k, v in settings.items() if k not in scaling}, "params": [weight]}], **self.options)
        if state:
            inner.state[weight] = dict(state)
        with scaled(inner, scaling):
            step_of(inner)()
        after: Mapping[str, Any] = inner.state[weight]
        return after

    def initial(self, settings: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
        """What the class keeps of a parameter before its first step; empty for most. Zeros take memory when they are written to."""
        if not self._begins:
            return {}
        small = torch.zeros(2, dtype=parameter.dtype, device=parameter.device)
        kept = self.cls([{**settings, "params": [small]}], **self.options).state.get(small, {})
        return {
            name: _spread(value, parameter) if isinstance(value, torch.Tensor) and value.dim() else value for name, value in kept.items()
        }

    def divides(self, settings: Mapping[str, Any], dtype: torch.dtype) -> bool:
        """Whether a step with a `GradScaler` leaves quotients in `param.grad`: fused kernels do, unless the class gives them copies.

        Args:
            settings: of the parameter's group.
            dtype: of the parameter.
        """
        weight = torch.zeros(1, dtype=dtype)
        weight.grad = torch.full_like(weight, 4)
        inner = self.cls([{**settings, "params": [weight]}], **self.options)
        with scaled(inner, {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}):
            step_of(inner)()
        return weight.grad.item() == 2

    @contextmanager
    def loaded(self, state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> Iterator[torch.optim.Optimizer]:
        """For the block, an instance of the class with this state and these groups, which it has brought up to date if they are old.

        Raises:
            ConfigError: they are another class's. torch takes them, and fails in the next step or computes with what it finds.
        """
        before = self.template.param_groups
        try:
            self.template.__setstate__({"state": {}, "param_groups": groups})
            for number, group in enumerate(self.template.param_groups):
                self._check_own(number, group, state)
            self.template.__setstate__({"state": state, "param_groups": self.template.param_groups})
            yield self.template
        finally:
            self.template.__setstate__({"state": {}, "param_groups": before})

    def _check_own(self, number: int, group: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
        """A setting too many may be a scheduler's, one too few of an older version; both, or a lack of state, are another class's."""
        lacking = [name for name in self.template.defaults if name not in group]
        foreign = [name for name in group if name not in (*self.template.defaults, "params", "param_names", "initial_lr")]
        if lacking and foreign:
            raise self._foreign(f"it has no {lacking[0]} and has {foreign[0]}", f"param_groups[{number}]")
        for place, parameter in enumerate(group["params"]):
            kept: Mapping[str, Any] = state.get(parameter) or {}
            for name in self.layout(settings_of(group), parameter.dtype, parameter.device) if kept else ():
                if name not in kept:
                    raise self._foreign(f"it has no {name}, only {', '.join(kept)}", f"param_groups[{number}]['params'][{place}]")

    def _foreign(self, reason: str, where: str) -> errors.ConfigError:
        name = self.cls.__name__
        fix = f"Load what {name} has saved. To begin {name} on weights that another has trained, load no state."
        return errors.ConfigError(f"OffloadedOptimizer: this is no state dict of {name}: {reason}", where=where, fix=fix)

    def layout(self, settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, torch.dtype]:
        """What the class keeps per element of a parameter, by name.

        Raises:
            ConfigError: parts give other bits than the whole, or the class fails on a plain tensor or gives other bits each time.

        Cost: some ten milliseconds for the first parameter of a kind.
        """
        key = (repr(sorted(settings.items(), key=lambda item: item[0])), dtype, device.type)
        known = self._known.get(key)
        if known is None:
            self._check_repeatable(settings, dtype, device)
            # Optimizers with noise draw numbers: the user's must not move.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode(False):
                for shape, scale in _TRIED:
                    known = self._try(settings, dtype, device, shape, scale)
                assert known is not None
                self._known[key] = known
        return known

    def _check_repeatable(self, settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Refuse a kernel that is not: trying it may go well by chance."""
        # torch 2.13: from the second step on, the momentum of the last elements comes from memory that nobody wrote, and may be NaN.
        chosen = settings.get("fused") and settings.get("momentum") and issubclass(self.cls, torch.optim.SGD)
        low = dtype in (torch.bfloat16, torch.float16) and not getattr(self.cls, "has_masters", False)
        if chosen and device.type == "cpu" and low:
            raise errors.ConfigError(
                f"OffloadedOptimizer: torch's fused {self.cls.__name__} with momentum gives other numbers each time in {dtype}",
                where="fused",
                fix="Leave fused= out, or train in float32, for which torchwrap.master_weights is enough.",
            )

    def _try(
        self, settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], scale: float
    ) -> dict[str, torch.dtype]:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=generator)
        gradients = [torch.randn(shape, generator=generator) * scale for _ in range(_STEPS)]
        spans = list(pairwise((*_CUTS, start.numel())))
        whole = start.to(device, dtype, copy=True)
        inner = self.cls([{**settings, "params": [whole]}], **self.options)
        parts = [start.to(device, dtype, copy=True).view(-1)[first:last] for first, last in spans]
        states: list[Mapping[str, Any]] = [{} for _ in parts]
        try:
            for gradient in gradients:
                full = gradient.to(device, dtype)
                whole.grad = full
                step_of(inner)()
                for number, part in enumerate(parts):
                    states[number] = self.step(settings, part, full.view(-1)[slice(*spans[number])], states[number])
        except Exception as error:
            raise self._refused(f"a step on a plain {dtype} tensor failed: {error}") from error
        kept: Mapping[str, Any] = inner.state[whole]
        layout = {name: value.dtype for name, value in kept.items() if isinstance(value, torch.Tensor) and value.shape == whole.shape}
        same = _equal(whole.view(-1), torch.cat(parts)) and all(kept.keys() == state.keys() for state in states)
        for name, value in kept.items() if same else ():
            if name in layout:
                same = same and _equal(value.view(-1), torch.cat([state[name].view(-1) for state in states]))
            else:
                same = same and all(_equal(value, state[name]) for state in states)
        if not same:
            raise self._refused("in parts it gives other numbers than as a whole")
        return layout

    def _refused(self, reason: str) -> errors.ConfigError:
        return errors.ConfigError(f"OffloadedOptimizer: {self.cls.__name__} cannot be offloaded: {reason}", where="optimizer", fix=_WAY_OUT)


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, without its parameters; tensors are copied, because schedulers change them in place."""
    left_out = ("params", "param_names")
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in group.items() if name not in left_out}


def scaling_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a `GradScaler` has set on an optimizer for the step that it calls; empty in other steps."""
    found = {name: getattr(optimizer, name, None) for name in _SCALING}
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def scaled(optimizer: torch.optim.Optimizer, scaling: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """For the block, the same on another optimizer."""
    for name, value in scaling.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in scaling:
            delattr(optimizer, name)


def step_of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The step of an instance of ours, without the hooks on all optimizers, which are for the steps that the user takes."""
    return functools.partial(plain_step(type(optimizer)), optimizer)


def plain_step(cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The class's step without those hooks."""
    step = cls.step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step  # torch 2.13: _patch_step_function


def _spread(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if value.any() or value.device.type != "cpu" or not parameter.numel():
        return torch.full(parameter.shape, value[0].item(), dtype=value.dtype, device=value.device)
    zeros = mmap.mmap(-1, parameter.numel() * value.element_size())
    return torch.frombuffer(zeros, dtype=value.dtype, count=parameter.numel()).view(parameter.shape)


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        nan = left.isnan()  # large gradients overflow in float16, by the same rule in parts
        return torch.equal(nan, right.isnan()) and torch.equal(left.masked_fill(nan, 0), right.masked_fill(nan, 0))
    return type(left) is type(right) and bool(left == right)
