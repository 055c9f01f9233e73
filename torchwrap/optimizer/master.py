"""Master weights: what an optimizer adds up in float32 while the model computes in bfloat16 or float16.

A weight in bfloat16 has eight bits of precision, so an update below 1/256 of it is lost; in training most are. The class made here keeps a
float32 copy of each such weight as one more entry of its state, lets the wrapped class update that, and rounds it into the weight. It is
an ordinary optimizer class, elementwise if the wrapped one is, so an `OffloadedOptimizer` runs it like any other, the copies on the disk.

Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.1. Where we differ: a weight that somebody else wrote to (a loaded
checkpoint, a clamp) is noticed element by element, and its copy begins anew from what was written.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchwrap.core import errors
from torchwrap.optimizer.elementwise import plain_step

__all__ = ["MASTER", "master_weights"]

MASTER = "master"
"""Name of the float32 weights in `optimizer.state[parameter]`."""


_made: dict[Any, type[torch.optim.Optimizer]] = {}  # by the class wrapped: the same class each time, so that a run is found again


def master_weights(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class that does what `cls` does to float32 copies of weights in bfloat16 and float16; other weights are as with `cls`.

    Gradients are cast to float32. What `cls` keeps per element is float32, too, and the copies are `optimizer.state[parameter]["master"]`.

    Args:
        cls: an optimizer class, `torch.optim.AdamW` say.

    Raises:
        ConfigError: that is no optimizer class.

    Exactness: bit-identical to `cls` on a float32 model that is given the same gradients; weights are its weights, rounded.
    Cost: 4 bytes per parameter more, and 4 instead of 2 for each number that `cls` keeps per element; while a parameter is updated, its
        gradient in float32.

    Example:
        >>> import torch, torchwrap
        >>> weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        >>> optimizer = torchwrap.master_weights(torch.optim.SGD)([weight], lr=1e-3)
        >>> for _ in range(8):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.detach()  # in bfloat16 alone, 1 - 0.001 is 1
        tensor([0.9922, 0.9922, 0.9922], dtype=torch.bfloat16)
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise errors.ConfigError(f"master_weights: {cls!r} is no optimizer class", where="cls", fix="Pass the class: torch.optim.AdamW.")
    if cls not in _made:
        _made[cls] = _make(cls)
    return _made[cls]


def _make(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    def step(self: Any, closure: Callable[[], float] | None = None) -> float | None:
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, state = self.param_groups, self.state
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _update(self, cls, group, parameter, state)
        finally:
            self.param_groups, self.state = groups, state
        return loss

    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, which would round what is kept to the dtype of the weights."""
        cls.load_state_dict(self, dict(state_dict))
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key != "step" and isinstance(value, torch.Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def reduce(self: Any) -> tuple[Any, ...]:
        return _blank, (cls,), self.__getstate__()  # no module has a name for the class

    name = f"master_weights({cls.__name__})"
    members: dict[str, Any] = {"step": step, "load_state_dict": load_state_dict, "__reduce__": reduce, "has_masters": True}
    return type(name, (cls,), {**members, "__doc__": cls.__doc__, "__module__": cls.__module__, "__qualname__": name})


def _blank(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    made = master_weights(cls)
    return made.__new__(made)


@torch.no_grad()
def _update(
    optimizer: Any, cls: type[torch.optim.Optimizer], group: dict[str, Any], parameter: torch.Tensor, state: dict[torch.Tensor, Any]
) -> None:
    """One parameter's step, by the code of `cls` on this instance with its groups and state replaced."""
    low = parameter.dtype in (torch.bfloat16, torch.float16)
    kept = dict(state.get(parameter, {}))
    first = low and MASTER not in kept
    leaf = _master(parameter, kept.pop(MASTER, None)) if low else parameter.detach()
    if first and kept:  # made by the constructor, in the dtype of the weight
        accepted = inspect.signature(cls).parameters
        kept = dict(cls([leaf], **{name: value for name, value in group.items() if name != "params" and name in accepted}).state[leaf])
    assert parameter.grad is not None
    leaf.grad = parameter.grad.float() if low else parameter.grad
    optimizer.param_groups = [{**group, "params": [leaf]}]
    optimizer.state = defaultdict(dict, {leaf: kept})
    plain_step(cls)(optimizer)
    after = dict(optimizer.state[leaf])
    leaf.grad = None
    if low:
        parameter.copy_(leaf)
        after[MASTER] = leaf
    state[parameter] = after


def _master(parameter: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    """The float32 weight: `known`, but for elements that are not the rounded ones any more."""
    if known is None:
        return parameter.detach().float()
    master = known.detach()
    written = master.to(parameter.dtype) != parameter.detach()
    if written.any():
        master.copy_(torch.where(written, parameter.detach().float(), master))
    return master
