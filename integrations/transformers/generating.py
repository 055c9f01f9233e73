"""Gives `generate` a cache on two sides where its caller passes none.

`generate` makes its cache in one place, the method `_prepare_cache_for_generation` (transformers 5.23), which knows what a plan needs: how
many sequences there will be and how long they may get. So that method of a wrapped model is ours, as an attribute of the object that
`unwrap` takes away again. The cache goes on as one that the caller had passed: it is what `generate` uses and returns. What the caller
chose (a cache, a kind of cache, no cache) stays, and so do caches of models that only propose tokens for another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from torchwrap.attention.cache import ArenaPlan
from torchwrap.attention.cooperative.planner import Plan, Rates
from torchwrap.attention.cooperative.settings import CacheSettings
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.layer import Layer, held_back
from torchwrap.core.swap import original_class
from torchwrap.integrations.transformers.cooperative import CooperativeCache, keeps_latents, plan_of_cache, shape_of_cache
from torchwrap.integrations.transformers.sites import asks_the_registry, code_of
from torchwrap.integrations.transformers.written import computes_with_what_a_cache_returns

__all__ = ["CacheMaker", "divides", "growing_layers", "plan_of_arenas"]

_METHOD = "_prepare_cache_for_generation"


def growing_layers(model: nn.Module) -> list[Any]:
    """The layers of the cache that `model.generate` makes by itself; empty for models that make none that grows, or have an encoder."""
    kind: Any = original_class(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(kind, _METHOD) or not kind.can_generate() or config.is_encoder_decoder or not kind._supports_default_dynamic_cache():
        return []
    return DynamicCache(config=config).layers


def divides(fqn: str, model: nn.Module) -> bool:
    """Has the cache of the model's generations keys of layers of full attention? A window is small and stays where it is.

    Args:
        fqn: name of the model in what is wrapped.
        model: of transformers.

    Raises:
        UnsupportedModelError: it has, and a cache on two sides would fail, or be gathered whole, in the midst of a generation: a module
            computes others from the keys of all tokens, or has other heads than the config says.
    """
    layers = growing_layers(model)
    full = {index for index, layer in enumerate(layers) if type(layer) is DynamicLayer}
    if not full or keeps_latents(model):
        return False
    for name, module in model.named_modules(prefix=fqn):
        if not asks_the_registry(module) or getattr(module, "layer_idx", None) not in full:
            continue
        lacking, kind = None, original_class(module).__name__
        if computes_with_what_a_cache_returns(code_of(module)):
            lacking = f"{kind} computes with the keys and values of all tokens itself, which would gather what is on the host"
        elif (sizes := _sizes(model, module)) is not None and sizes[0] != sizes[1]:
            (heads, width), (said, wide) = sizes
            lacking = f"{kind} has {heads} key heads of {width}, and the config says {said} of {wide}"
        if lacking is not None:
            raise UnsupportedModelError(f'cache="cooperative": {lacking}', where=name, fix='Use cache="arena", the default.')
    return True


def _sizes(model: Any, module: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Key heads and width of an attention module, and those that are planned for it; None for one that does not say so itself."""
    numbers = [getattr(module, name, None) for name in ("num_heads", "num_key_value_groups", "head_dim")]
    heads, group, width = (number if isinstance(number, int) else 0 for number in numbers)
    if module.config is not model.config.get_text_config(decoder=True) or not (heads and group and width):
        return None
    shape = shape_of_cache(model, module.layer_idx, 1, torch.float32)
    return (heads // group, width), (shape.kv_heads, shape.width)


def plan_of_arenas(model: Any, tokens: int, batch: int) -> ArenaPlan | None:
    """What the growing cache of a model takes; None if it has none, or one with layers that do not grow by tokens."""
    layers = growing_layers(model)
    if not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        return None
    return ArenaPlan(
        tokens=tokens,
        windows=tuple(getattr(layer, "sliding_window", None) for layer in layers),
        token_bytes=tuple(shape_of_cache(model, index, batch, model.dtype).token_bytes for index in range(len(layers))),
    )


class CacheMaker:
    """Stands for one model's method that makes the cache of a generation.

    Args:
        model: of transformers; `divides` says yes to it.
        settings: of the caches.
        layer: that stands on the model; while it is held back the model's own method works.
    """

    def __init__(self, model: nn.Module, settings: CacheSettings, layer: Layer) -> None:
        self.model, self.settings, self.layer = model, settings, layer
        self._rates: dict[tuple[int, torch.device, torch.dtype], Rates] = {}

    def put(self) -> None:
        """Let the model's `generate` ask here."""
        self.model.__dict__[_METHOD] = self

    def take(self) -> None:
        """Let it ask the model's own method again, unless somebody else's stands there."""
        if self.model.__dict__.get(_METHOD) is self:
            del self.model.__dict__[_METHOD]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin._prepare_cache_for_generation`.

        Raises:
            PlanError: device and host together have no memory for the sequences; nothing was generated.
            UnsupportedModelError: the model lies on several devices.
        """
        own: Callable[..., Any] = getattr(original_class(self.model), _METHOD)
        asked = inspect.signature(own).bind(self.model, *args, **kwargs).arguments
        config, given = asked["generation_config"], asked["model_kwargs"]
        if not asked["batch_size"] or not self._wanted(config, given):  # what a model does with no rows is its own affair
            return own(self.model, *args, **kwargs)
        beams = max(config.num_beams or 1, config.num_return_sequences or 1)
        # The last token that is generated is never stored; proposed ones may be, and memory grows for them.
        cache = self._made(max(1, asked["max_cache_length"]), asked["batch_size"] * beams, given)
        given["past_key_values"] = cache
        chunk = cache.plan.prefill_tokens
        if config.prefill_chunk_size is None and cache.plan.host_bytes and cache.plan.tokens > chunk and not _is_multimodal(given):
            config.prefill_chunk_size = chunk  # of this generation: `generate` works on a copy
        return None

    def plan(self, tokens: int, batch: int) -> Plan:
        """What the cache of such a generation would be; the machine is measured once for each batch."""
        return self._planned(tokens, batch, self._device({}))

    def _planned(self, tokens: int, batch: int, device: torch.device) -> Plan:
        model: Any = self.model
        kind = batch, device, model.dtype
        plan = plan_of_cache(
            model, tokens=tokens, batch=batch, device=device, rates=self._rates.get(kind), **asdict(self.settings)
        )
        self._rates[kind] = plan.rates
        return plan

    def _device(self, given: dict[str, Any]) -> torch.device:
        device: torch.device = self.model.device  # type: ignore[assignment]
        mask = given.get("attention_mask")
        # Weights may be placed elsewhere between calls; a mask on a card says where it is computed.
        return mask.device if isinstance(mask, torch.Tensor) and device.type in ("cpu", "meta") else device

    def _wanted(self, config: Any, given: dict[str, Any]) -> bool:
        if any(held is self.layer for held in held_back()):
            return False
        if given.get("past_key_values") is not None or config.use_cache is False or config.is_assistant:
            return False
        return config.cache_implementation in (None, "dynamic")

    def _made(self, tokens: int, batch: int, given: dict[str, Any]) -> CooperativeCache:
        model: Any = self.model
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        ranks = getattr(model, "tp_size", None) or 1
        if len(places) > 1 or ranks > 1:
            where = f"is divided over {ranks} processes" if ranks > 1 else f"lies on {', '.join(sorted(places))}"
            raise UnsupportedModelError(
                f"{type(model).__name__} {where}, and a cooperative cache is for one device and its host",
                where="generate",
                fix='Use cache="arena", or load the model on one device.',
            )
        device = self._device(given)
        rates = self._planned(tokens, batch, device).rates
        return CooperativeCache(model, tokens=tokens, batch=batch, device=device, rates=rates, **asdict(self.settings))


def _is_multimodal(given: dict[str, Any]) -> bool:
    """Inputs beside tokens, which `generate` cannot cut into chunks."""
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() for name, value in given.items() if name != "attention_mask")
