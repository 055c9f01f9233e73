"""Mixtures whose experts are slices of one parameter per projection, and where a call says which of them it uses.

transformers 5.23 runs such a module in one of several ways, chosen by the config and changed while the model generates. Those listed here
use no slice but those named in `top_k_index`; held by tests/integrations/test_experts.py. The loop of the class itself ("eager") is
trusted where its byte code is that of Mixtral's, as generated for 54 of the 65 classes.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import nn

from torchwrap.core.integration import ExpertsRef
from torchwrap.core.swap import original_class

__all__ = ["experts", "routed"]

_ROUTED = ("grouped_mm", "batched_mm")
_ARGUMENT, _POSITION = "top_k_index", 1


def experts(model: nn.Module) -> list[ExpertsRef]:
    """Modules of that kind, by name."""
    found = []
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        if not (isinstance(count, int) and count > 1 and hasattr(module, "_is_expert_parallel") and _code(module) is not None):
            continue
        names = tuple(n for n, p in module._parameters.items() if p is not None and p.dim() > 1 and p.shape[0] == count)
        if names:
            found.append(ExpertsRef(name, module, names, count, routed))
    return found


def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The experts used by a call of the module, repeated as they come; None if it may use others, too."""
    if module._is_expert_parallel:
        return None
    way = getattr(module.config, "_experts_implementation", None)
    if way not in _ROUTED and not (way in ("eager", None) and _is_usual_loop(module)):
        return None
    routing = args[_POSITION] if len(args) > _POSITION else kwargs.get(_ARGUMENT)
    return routing if isinstance(routing, torch.Tensor) and not routing.is_floating_point() else None


def _code(module: nn.Module) -> CodeType | None:
    return _code_of(original_class(module))


def _code_of(kind: type[nn.Module]) -> CodeType | None:
    """The class's own forward, under transformers' dispatch, if it takes the routing where it is expected."""
    code: CodeType | None = getattr(getattr(kind.forward, "__wrapped__", None), "__code__", None)
    expected = (_POSITION, _ARGUMENT)
    return code if code is not None and expected in enumerate(code.co_varnames[1 : code.co_argcount]) else None


def _is_usual_loop(module: nn.Module) -> bool:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    usual, own = _code_of(MixtralExperts), _code(module)
    return (
        usual is not None
        and own is not None
        and (own.co_code, own.co_names, own.co_consts) == (usual.co_code, usual.co_names, usual.co_consts)
    )
