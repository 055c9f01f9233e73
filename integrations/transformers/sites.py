"""Which modules of a model ask transformers' registry for their attention, and which models cannot be led elsewhere."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.swap import original_class
from torchwrap.integrations.transformers.written import joins_numbers_to_its_mask

__all__ = ["asks_the_registry", "can_be_set", "code_of", "refuse", "unfit", "with_nested"]

_MASKS = ("create_causal_mask", "create_bidirectional_mask", "create_sliding_window_causal_mask", "create_masks_for_generate")


def refuse(fqn: str, model: Any) -> None:
    """Raise `UnsupportedModelError` for a model whose attention cannot be set, or that always returns its weights."""
    kind = original_class(model)
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(
            f"{kind.__name__} is configured to return the weights of attention in every call, which no fast way of computing it has",
            where=fqn or kind.__name__,
            fix="Set model.config.output_attentions = False first.",
        )
    if not can_be_set(kind):
        raise UnsupportedModelError(
            f"the attention of {kind.__name__} cannot be set: its code does not ask transformers' AttentionInterface",
            where=fqn or kind.__name__,
            fix="Apply fast_attention to the parts whose attention can be set, e.g. torchwrap.fast_attention(model.language_model), "
            "or leave it out: apply(model, ..., strict=False) goes on without it.",
        )


def can_be_set(kind: type) -> bool:
    """Does the code of this model class ask the registry, or have no attention of its own?

    The same question as `PreTrainedModel._can_set_attn_implementation` (transformers 5.23), which reads source files and leaves its
    answer on the class.
    """
    scope = vars(sys.modules.get(kind.__module__, object))
    if "ALL_ATTENTION_FUNCTIONS" in scope:
        return True
    own = (value for value in scope.values() if isinstance(value, type) and value.__module__ == kind.__module__)
    return bool(scope) and not any(nn.Module in value.__bases__ and "Attention" in value.__name__ for value in own)


def asks_the_registry(module: nn.Module) -> bool:
    """Does the module's own code look its attention function up?"""
    code = getattr(code_of(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def unfit(model: nn.Module, prefix: str = "") -> tuple[set[int], list[tuple[str, str]]]:
    """Configs under which our name must not stand, since a module would compute something else then, without an error.

    Three kinds of modules do (transformers 5.23). Sparse attention (DeepSeek V3.2, GLM-MoE-DSA, HY V4, AXK2, MiniMax M3, dots3 Note,
    Mistral Large 4) hides the keys that it did not choose only under the names "eager" and "sdpa", and hands others its choice beside the
    mask. Some modules (GIT, BigBirdPegasus, Informer, the audio of Gemma 4) add the mask that was made under that name to scores of their
    own. And one (DeepSeek V4) joins zeros and -inf to it for keys that it made itself.

    Returns:
        the ids of such configs and of those around them, whose masks they may get; each module's fqn with the reason.
    """
    found: list[Any] = []
    reasons: list[tuple[str, str]] = []
    answers: dict[tuple[type, type | None], str | None] = {}
    models = {fqn: module for fqn, module in model.named_modules(prefix=prefix) if isinstance(module, PreTrainedModel)}
    for fqn, module in model.named_modules(prefix=prefix):
        holder = next((models[name] for name in _outwards(fqn) if name in models), None)
        config = getattr(module, "config", None) or getattr(holder, "config", None)
        kinds = original_class(module), None if holder is None else original_class(holder)
        if kinds not in answers:
            answers[kinds] = _reason(module, holder)
        if (reason := answers[kinds]) is not None and config is not None:
            found.append(config)
            reasons.append((fqn, f"{kinds[0].__name__} {reason}"))
    everywhere = {id(config): config for module in models.values() for config in with_nested(module.config)}
    around = [config for config in everywhere.values() if any(part is one for part in with_nested(config) for one in found)]
    return {id(config) for config in (*found, *around)}, reasons


def _outwards(fqn: str) -> Iterator[str]:
    """The names of a module and of those around it, innermost first."""
    while fqn:
        yield fqn
        fqn = fqn.rpartition(".")[0]
    yield ""


def _reason(module: nn.Module, holder: nn.Module | None) -> str | None:
    if asks_the_registry(module):
        if joins_numbers_to_its_mask(code_of(module)):
            return "joins numbers that are added to scores to the mask of its model"
        return "hides the keys that it did not choose only where eager or sdpa attention is set" if _chooses_by_name(module) else None
    adds = holder is not None and holder is not module and _adds_masks(module, holder)
    return "adds the masks of its model to scores of its own" if adds else None


def _chooses_by_name(module: nn.Module) -> bool:
    """Does the module's own code ask whether the implementation is one of "eager" and "sdpa"?"""
    return any(
        "_attn_implementation" in code.co_names
        and any(isinstance(value, (tuple, frozenset)) and {"eager", "sdpa"} <= set(value) for value in code.co_consts)
        for _, code in _methods(original_class(module))
    )


def _adds_masks(module: nn.Module, holder: nn.Module) -> bool:
    """Does the module, or one that it makes later, compute weights of attention from a mask that `holder` has made for the registry?"""
    asked = getattr(code_of(holder), "__code__", None)
    if asked is None or not set(_MASKS) & set(asked.co_names):
        return False
    kind = original_class(module)
    scope = vars(sys.modules.get(kind.__module__, object))
    later = [scope.get(name) for method, code in _methods(kind) if method != "__init__" for name in code.co_names]
    return any(_weighs(one) for one in (kind, *later) if isinstance(one, type) and issubclass(one, nn.Module))


def _weighs(kind: type) -> bool:
    code = getattr(inspect.unwrap(vars(kind).get("forward", kind)), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" in code.co_names:
        return False
    return "softmax" in code.co_names and "attention_mask" in code.co_varnames[: code.co_argcount]


def _methods(kind: type) -> Iterable[tuple[str, CodeType]]:
    """The functions in a class and in those it inherits from, less those of torch and of all models."""
    own: Sequence[type] = [one for one in kind.__mro__ if one.__module__ == kind.__module__]
    functions = ((name, inspect.unwrap(value)) for one in own for name, value in vars(one).items() if isinstance(value, FunctionType))
    return ((name, function.__code__) for name, function in functions if isinstance(function, FunctionType))


def code_of(module: nn.Module) -> Any:
    """The module's `forward` as its author wrote it."""
    return inspect.unwrap(original_class(module).forward)


def with_nested(config: Any) -> Iterator[Any]:
    """A config and those in it, of towers and the like."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        nested = getattr(config, name, None)
        if hasattr(nested, "_attn_implementation_internal"):
            yield from with_nested(nested)
