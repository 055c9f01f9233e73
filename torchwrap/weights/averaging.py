"""Keeping torch's averages of weights (`torch.optim.swa_utils.AveragedModel`) away from weights that are not there.

An average reads the parameters of the model and writes its own, outside of any forward: placeholders would make it NaN in silence, and for
ever, since the next average begins with it. There is no hook for this, so as long as a model is wrapped the method looks first.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from torchwrap.core import errors
from torchwrap.core.tensors import data_of, is_placeholder

__all__ = ["look_at_averages"]

_plain = AveragedModel.update_parameters


def look_at_averages(look: bool) -> None:
    """Refuse averages of weights that are away, or do not; a method that somebody else has put there stays."""
    if AveragedModel.update_parameters is (_plain if look else _looking):
        AveragedModel.update_parameters = _looking if look else _plain  # type: ignore[method-assign]


def _looking(self: Any, model: nn.Module) -> None:
    for each in (model, self.module):
        for name, parameter in each.named_parameters():
            if is_placeholder(data_of(parameter)):
                raise errors.ConflictError(
                    f"torchwrap: AveragedModel would average {name}, whose weights are away",
                    where=name,
                    fix="Average one weight after the other: with torchwrap.core.tensors(model, name) as new, "
                    "torchwrap.core.tensors(average, name, write=True) as old: old[name].lerp_(new[name], 1 - decay).",
                )
    _plain(self, model)
