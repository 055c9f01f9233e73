"""Layers of transformers' growing caches that write new tokens in place.

`DynamicLayer.update` (transformers 5.23) concatenates all keys and all values with the new token, for each token and layer. These
layers keep theirs in an `Arena`, take over what a plain layer holds without copying it, and are plain layers in every other respect.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from torchwrap.attention.cache import Arena

__all__ = ["ArenaLayer", "ArenaSlidingLayer", "into_arenas"]


def into_arenas(cache: object) -> None:
    """Give a growing cache's plain layers memory that grows in place; any other cache or layer is left as it is."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache  # the other one is written once
    if not isinstance(cache, Cache) or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = ArenaLayer.taking_over(layer)
        elif type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1:
            cache.layers[index] = ArenaSlidingLayer.taking_over(layer)


def _growable() -> bool:
    """Views of an arena change later, which a graph kept for a backward must not see, and its growth is no part of a compiled graph."""
    return not torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling()


class _InArena(DynamicLayer):
    """What both kinds share."""

    arena: Arena

    @classmethod
    def taking_over(cls, layer: DynamicLayer) -> _InArena:
        """A layer with everything `layer` has; its tensors are not copied."""
        made = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        made.arena = Arena(layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None)
        return made

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        if keys is not self.arena.keys:  # set from outside: by the plain update, a copy to another device, a choice of rows
            self.arena.clear()
            if keys is not None and values is not None and keys.numel():
                self.arena.hold(keys, values)
        whole = self.arena.append(key_states, value_states)
        self.keys, self.values = self.arena.keys, self.arena.values
        return whole

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows exchanged in place."""
        if self.keys is None or self.keys is not self.arena.keys or not _growable():
            super().reorder_cache(cast("torch.LongTensor", beam_idx))
            return
        self.arena.reorder(beam_idx.to(self.keys.device))
        self.keys, self.values = self.arena.keys, self.arena.values


class ArenaLayer(_InArena):
    """A `DynamicLayer` whose keys and values are views of an arena."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the others; returns views of all."""
        if not _growable():
            return super().update(key_states, value_states, *args, **kwargs)
        return self._append(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """As for a plain layer; the places of the tokens are used again."""
        if self.keys is not self.arena.keys or tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)
            return
        self.arena.crop(-tokens_to_remove)
        self.keys, self.values = self.arena.keys, self.arena.values


class ArenaSlidingLayer(_InArena, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose window wanders through an arena."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the window; returns views of what the new tokens see."""
        if not _growable() or self.record_past:
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        whole = self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return whole
