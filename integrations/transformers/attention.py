"""Leads transformers' attention through `torchwrap.attention`, by the two registries that the library has for this.

A model looks its attention function up under the name in its config, and the function that builds masks under the same name. Both
registries are process-wide, so ours is entered once, under a name of its own, and a model is switched over by writing that name into
its configs, one for each nested model. The name must not contain "flash" (transformers 5.23 asks by substring whether it is FlashAttention)
and is never saved: configs drop it when they are serialised. A layer on each attention module says for whom the function works.

Weights of attention do not exist in any fast way of computing it. A call that asks for them runs the model's own eager function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from torchwrap.attention.cache import ArenaPlan
from torchwrap.attention.cooperative.planner import Plan
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.attention.transforms import is_mapped
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.core.integration import AttentionRoute
from torchwrap.core.layer import CallState, Layer, held_back
from torchwrap.core.swap import layers_of
from torchwrap.integrations.transformers.batching import StandIn, attend_paged, steps
from torchwrap.integrations.transformers.cache import into_arenas
from torchwrap.integrations.transformers.generating import CacheMaker, divides, plan_of_arenas
from torchwrap.integrations.transformers.masks import mask_maker, packed_mask, user_mask, without_mask
from torchwrap.integrations.transformers.naming import NAME, Name, implementation_before
from torchwrap.integrations.transformers.sequence import SequenceLayer, refuse_to_divide, running
from torchwrap.integrations.transformers.sites import asks_the_registry, code_of, refuse, unfit, with_nested
from torchwrap.integrations.transformers.tensor_parallel import ProjectionLayer, projections

__all__ = ["NAME", "AttentionLayer", "ModelLayer", "TransformersRoute", "attention_forward", "attention_mask", "route"]

# Arguments with which a model chooses keys in a way of its own (transformers 5.23: sparse attention; sinks of every query in Inkling 2).
OWN_KEYS = ("block_indices", "indices", "sinks")

_calls = CallState()
"""Layers of the models whose calls run, and configs of those whose call returns weights of attention; innermost call last."""

_NO_CALL: tuple[tuple[ModelLayer, ...], tuple[Any, ...]] = ((), ())
_packed = CallState()
"""What the running call is to do by type of attention, if it is one of continuous batching."""


class AttentionLayer(Layer):
    """Stands on an attention module and says whose it is; changes nothing itself."""

    where = "outside"

    def __init__(self, fqn: str, service: Service, original: str | None, projection: ProjectionLayer | None = None) -> None:
        self.fqn, self.service, self.original, self.projection = fqn, service, original, projection

    def tiles(self, module: nn.Module, query: Tensor, key: Tensor) -> bool:
        """Is this call to be computed together with its projection, in blocks of rows?"""
        if (
            self.projection is None
            or self.service.sequence is not None
            or query.shape[2] <= 1
            or isinstance(key, TieredTensor)
            or torch.compiler.is_compiling()
        ):
            return False
        return self.projection.takes(module)


@dataclass
class TransformersRoute(AttentionRoute):
    """Attention of one transformers model.

    Attributes:
        originals: every config of the model with the implementation it had.
        led: the configs that have our name because of this route.
        makers: for each model that generates with caches on two sides, what makes them.
        stand_ins: of the models that can batch continuously.
    """

    originals: list[tuple[Any, str | None]] = field(default_factory=list)
    led: list[Any] = field(default_factory=list)
    makers: list[CacheMaker] = field(default_factory=list)
    stand_ins: list[StandIn] = field(default_factory=list)

    def set(self) -> None:
        """Write our name into every config, and let `generate` ask for its cache here."""
        for config, _ in self.originals:
            Name.put(config)
            self.led.append(config)
        for maker in self.makers:
            maker.put()
        for stand_in in self.stand_ins:
            stand_in.open()

    def busy(self) -> str | None:
        """Whether continuous batching runs."""
        return next((reason for stand_in in self.stand_ins if (reason := stand_in.busy())), None)

    def restore(self) -> None:
        """Write back what was there, where our name still is."""
        for stand_in in self.stand_ins:
            stand_in.close()
        for config in self.led:
            Name.take(config, self.original(config)[1])
        self.led.clear()
        for maker in self.makers:
            maker.take()

    def plan(self, tokens: int, batch: int) -> Plan | ArenaPlan | None:
        """Of the cache on two sides that the first model makes, else of its growing cache."""
        if self.makers:
            return self.makers[0].plan(tokens, batch)
        models = (module for _, module, layer in self.places if isinstance(layer, ModelLayer))
        return next((plan for model in models if (plan := plan_of_arenas(model, tokens, batch)) is not None), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "led": [config for config in self.led if config._attn_implementation_internal == NAME]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for config in self.led:
            Name.put(config)

    def original(self, config: object) -> tuple[bool, str | None]:
        """Whether the config belongs to this model, and the implementation it had."""
        return next(((True, name) for known, name in self.originals if known is config), (False, None))


class ModelLayer(Layer):
    """Stands on each model: sees what a call asks for, and gives growing caches memory that grows in place."""

    where = "outside"

    def __init__(self, fqn: str, service: Service, owner: TransformersRoute) -> None:
        self.fqn, self.service, self.route = fqn, service, owner

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layers, asked = _calls.peek(_NO_CALL)
        led = (config for config, _ in self.route.originals)
        if kwargs.get("output_attentions") and any(config._attn_implementation_internal == NAME for config in led):
            self.service.leave(
                self.fqn, "it returns the weights of attention (output_attentions=True)",
                "Leave output_attentions out to have it served.",
            )  # fmt: skip
            asked = (*asked, *(config for config, _ in self.route.originals))
        _calls.push(((*layers, self), asked))
        _packed.push((_packed.peek() or steps(kwargs)) if "cache" in kwargs else None)
        known = self.route.original(module.config)[0]  # others compute as they did, with caches as they were
        if known and self.service.cache != "keep" and not torch.compiler.is_dynamo_compiling():
            into_arenas(kwargs.get("past_key_values"))
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        _calls.pop()
        _packed.pop()
        return output

    def failed(self, module: nn.Module, error: BaseException) -> None:
        _calls.pop()
        _packed.pop()


def route(model: nn.Module, service: Service, prefix: str = "") -> TransformersRoute:
    """How the attention of `model` and of the models in it is led through `service`; touches nothing.

    Raises:
        UnsupportedModelError: one of them computes attention in a way that cannot be set, or always returns its weights.
    """
    found = TransformersRoute()
    models = [(fqn, module) for fqn, module in model.named_modules(prefix=prefix) if isinstance(module, PreTrainedModel)]
    for fqn, module in models:
        refuse(fqn, module)
    alone, reasons = unfit(model, prefix)
    sites = [(fqn, module) for fqn, module in model.named_modules(prefix=prefix) if asks_the_registry(module)]
    sites = [(fqn, module) for fqn, module in sites if id(module.config) not in alone]
    for fqn, reason in reasons:
        fix = "Leave this model out, or apply fast_attention to other parts of it: its own attention goes on computing it."
        if not sites:
            raise UnsupportedModelError(f"no other function can compute this attention: {reason}", where=fqn, fix=fix)
        service.leave(fqn, reason, "The other parts of the model are served.")
    configs: dict[int, Any] = {}
    for _, module in (*models, *sites):
        configs.update((id(config), config) for config in with_nested(module.config) if id(config) not in alone)
    found.originals = [(config, implementation_before(config)) for config in configs.values()]
    divided = projections(sites, service)
    for fqn, module in sites:
        _, _, projection = divided.get(fqn, (None, None, None))
        found.places.append((fqn, module, AttentionLayer(fqn, service, implementation_before(module.config), projection)))
        found.attends.append(fqn)
    found.places += divided.values()
    for fqn, module in models:
        layer = ModelLayer(fqn, service, found)
        found.places.append((fqn, module, layer))
        if id(module.config) in alone:
            continue
        if service.cooperation is not None and divides(fqn, module):
            found.makers.append(CacheMaker(module, service.cooperation, layer))
            found.generates.append(fqn)
        if hasattr(module, "init_continuous_batching"):
            found.stand_ins.append(StandIn(fqn, module, layer, service, NAME))
    if service.sequence is not None:
        refuse_to_divide(model, sites)
        found.divides = True
        found.notes.append(f"sequences divided over {service.sequence.size} processes ({service.sequence.way})")
        found.places += [(fqn, module, SequenceLayer(fqn, service.sequence)) for fqn, module in models]
    names = sorted({str(name) for _, name in found.originals})
    if divided:
        found.notes.append(f"{len(divided)} output projections summed over their processes in blocks ({service.allreduce_blocks})")
    found.notes.append(f"{len(sites)} attention modules through {NAME!r} instead of {', '.join(map(repr, names))}")
    return found


# What the registries call


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls under `NAME`.

    Args:
        module: the attention module.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Sk, D).
        value: (B, Hkv, Sk, Dv).
        attention_mask: a `TileMask` from `attention_mask`, or what the caller of the model gave.
        dropout: of the weights; 0 outside training.
        scaling: of the scores; None: `1 / sqrt(D)`.
        is_causal: without a mask, whether a query sees only keys up to its own; None: what the module says.
        sliding_window: without a mask, how many keys a causal query sees.
        softcap: bound of the scaled scores.
        s_aux: (Hq), sinks.
        position_bias: (1 or B, Hq, Sq, Sk), added to the scores.
        **kwargs: for the model's own function, if the call goes there; with `cache`, those of continuous batching.

    Returns:
        (B, Sq, Hq, Dv), contiguous, and None; from the model's own eager function the weights.
    """
    layer = next((layer for layer in layers_of(module) if isinstance(layer, AttentionLayer)), None)
    stands: AttentionLayer | ModelLayer | None = layer or _model_around(module.config)
    service = stands.service if stands is not None else Service(fallback="silent")
    fqn = layer.fqn if layer is not None else type(module).__name__
    if "cache" in kwargs and (todo := _packed.peek() or steps(kwargs)) is not None:
        if position_bias is not None:
            raise UnsupportedModelError("continuous batching gives no positions to a bias", where=fqn, fix="Use generate.")
        out = attend_paged(fqn, service, module, query, key, value, todo, kwargs, scale=scaling, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None
    own = _own_implementation(module.config, layer)
    if own is None and stands is None:
        own = _of_nobody(module.config, kwargs)
        if own == "eager" and attention_mask is None:  # to which no mask means that everything is seen
            seen = getattr(module, "is_causal", True) if is_causal is None else is_causal
            attention_mask, key, value = without_mask(query, key, value, bool(seen), sliding_window)
    chosen = [name for name in OWN_KEYS if kwargs.get(name) is not None]
    if own is None and chosen:
        if service.sequence is not None:
            raise UnsupportedModelError("it chooses its keys itself, in its part of a sequence", where=fqn, fix="Leave sp_group out.")
        taken = inspect.signature(_own_function(module, "eager")).parameters
        if ignored := [name for name in chosen if name not in taken]:
            raise UnsupportedModelError(
                f"it chooses its keys itself ({', '.join(ignored)}), which its eager function ignores", where=fqn, fix="Unwrap the model."
            )
        service.leave(fqn, f"it chooses its keys itself ({', '.join(chosen)})", "Nothing has to be done.")
        own = "eager"
    if own is None and attention_mask is not None and not isinstance(attention_mask, Tensor):  # a BlockMask
        service.leave(fqn, "its mask is one of FlexAttention", "Give a mask that is a tensor, of two or four dimensions.")
        own = "flex_attention"
    if own is not None:
        given = dict(
            dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux,
            position_bias=position_bias,
        )  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        function = _own_function(module, own)
        return function(module, query, key, value, _for_own(attention_mask, own, query, fqn), **given, **kwargs)
    causal = bool(_is_causal(module, layer) if is_causal is None else is_causal)
    if (lengths := kwargs.get("cu_seq_lens_q")) is not None:
        if service.sequence is not None:
            raise UnsupportedModelError("it has packed sequences in divided ones", where=fqn, fix="Leave sp_group out.")
        shape = (query.shape[0], query.shape[2], key.shape[2])
        attention_mask = packed_mask(attention_mask, lengths, kwargs.get("cu_seq_lens_k"), shape, causal, sliding_window)
    if service.sequence is not None:
        if attention_mask is None and _is_causal(module, layer):
            tokens = query.shape[2] * service.sequence.size
            attention_mask = TileMask(1, tokens, tokens, right=0, left=None if sliding_window is None else sliding_window - 1)
    elif attention_mask is None:
        attention_mask, key, value = without_mask(query, key, value, causal, sliding_window)
    else:
        attention_mask = user_mask(attention_mask, query.shape[2])
        if attention_mask.shape[-1] > key.shape[2]:
            kept = key.shape[2]
            attention_mask = attention_mask.sub(columns=(0, kept)) if isinstance(attention_mask, TileMask) else attention_mask[..., :kept]
    if query.shape[0] != key.shape[0]:  # learned queries shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    options: dict[str, Any] = dict(mask=attention_mask, scale=scaling, softcap=softcap, sinks=s_aux, bias=position_bias, dropout=dropout)
    if layer is not None and layer.tiles(module, query, key):
        return service.defer(fqn, query, key, value, **options), None
    out = service.attend(fqn, query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(**kwargs: Any) -> Tensor | None:
    """What transformers calls under `NAME` for a mask; keywords as for its own `sdpa_mask`."""
    if _packed.peek() is not None:
        return None  # what belongs together is known
    divided = running()
    if divided is not None:
        return divided.mask(**kwargs)
    own = _own_implementation(kwargs.get("config"), None)
    padding = kwargs.get("attention_mask")
    if own is None and isinstance(padding, Tensor) and is_mapped(padding):
        raise UnsupportedModelError(
            "torch.func.vmap maps over an attention_mask, whose numbers nobody can look at then",
            where="attention_mask",
            fix="Leave attention_mask out where nothing is padded, or call the model for one sample after the other.",
        )
    function = mask_maker() if own is None else ALL_MASK_ATTENTION_FUNCTIONS.get(own, None)
    mask: Tensor | None = None if function is None else function(**kwargs)
    return mask


def _own_implementation(config: object, layer: AttentionLayer | None) -> str | None:
    """The model's own implementation to use in this call, or None for ours."""
    for held in held_back():
        if held is layer and layer is not None:
            return layer.original or "eager"
        if layer is None and isinstance(held, ModelLayer):
            known, original = held.route.original(config)
            if known:
                return original or "eager"
    if any(config is asked for asked in _calls.peek(_NO_CALL)[1]):
        return "eager"
    return None


def _is_causal(module: nn.Module, layer: AttentionLayer | None) -> bool:
    """What no mask means: what the module says, or (Splinter) what its own function takes it for, which is everything if that is eager."""
    return bool(getattr(module, "is_causal", layer is None or layer.original != "eager"))


def _model_around(config: object) -> ModelLayer | None:
    """The layer of the running model that a module without a layer of its own belongs to."""
    layers: tuple[ModelLayer, ...] = _calls.peek(_NO_CALL)[0]
    return next((layer for layer in layers if layer.route.original(config)[0]), None)


def _of_nobody(config: Any, asked: dict[str, Any]) -> str | None:
    """What computes for a module of no wrapped model: its own implementation, if a wrapped one has the same config object.

    Whoever set our name himself has calls without weights served.
    """
    name = config._attn_implementation_internal
    if isinstance(name, Name):
        return name.original or "eager"
    return "eager" if asked.get("output_attentions") else None


def _own_function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the module would call under this name: eager functions are in the file of the model, the others in the registry."""
    scope = code_of(module).__globals__
    function: Callable[..., tuple[Tensor, Tensor | None]] = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        name, scope["eager_attention_forward"]
    )
    return function


def _for_own(mask: Tensor | None, name: str, query: Tensor, where: str) -> Tensor | None:
    """A mask of ours as transformers' functions want it: additive for eager, boolean for the others."""
    if not isinstance(mask, TileMask):
        return mask
    if name == "flex_attention":  # which adds a tensor to scores, whatever it says, and writes beyond its memory on CPUs (torch 2.13)
        reason = "a call of a model with FlexAttention cannot end without the technique it began with"
        raise UnsupportedModelError(reason, where=where, fix="Disable it before.")
    visible = mask.rectangles((0, mask.shape[2]), (0, mask.shape[3]))
    if name != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=query.dtype, device=visible.device).masked_fill(~visible, torch.finfo(query.dtype).min)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
