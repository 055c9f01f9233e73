"""A growing cache of transformers with part of its keys and values on the host, attended there.

Only layers of full attention are divided; a sliding window is small and stays where the model keeps it. What the layers hand to the
model are `TieredTensor`s, which the attention function of `torchwrap.fast_attention` recognises; any other gathers them, with a warning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import machine_for
from torchwrap.attention.cooperative.measure import measure_rates
from torchwrap.attention.cooperative.planner import RECENT, CacheShape, Rates, Split, plan_cache
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.core.config import parse_size
from torchwrap.core.errors import UnsupportedModelError

__all__ = ["CooperativeCache", "CooperativeLayer"]


class CooperativeCache(DynamicCache):
    """A cache for `generate(past_key_values=...)` that may be larger than the device.

    Args:
        model: a transformers model; its config says how many layers and heads there are.
        tokens: longest sequence, prompt and answer together.
        device_memory: for keys and values on the device, as bytes or like "2 GiB".
        host_memory: the same on the host.
        batch: sequences at a time; beams and returned sequences count.
        device: where the model computes; None: where its parameters are.
        dtype: of keys and values; None: that of the model.
        split: "token", "layer", "upload", or "auto" for the fastest by prediction.
        recent: most recent tokens that stay on the device.
        chunk_memory: one of the two buffers on the device for what comes from the host.
        rates: of the machine; None: measured now, which takes a moment.
        workers: threads that attend on the host.

    Attributes:
        plan: what lies where, and the predicted time; `plan.prefill_tokens` is a good `prefill_chunk_size` for `generate`.
        store: the keys and values.

    Raises:
        PlanError: the memory does not suffice; nothing stays allocated.
        UnsupportedModelError: the model has no layer of full attention with a cache of its own.

    Exactness: tokens of greedy generation as with a cache on one device, up to rounding of sums in another order.

    Example:
        >>> cache = CooperativeCache(model, tokens=131072, device_memory="2 GiB", host_memory="24 GiB")  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache, prefill_chunk_size=cache.plan.prefill_tokens)  # doctest: +SKIP
    """

    def __init__(
        self, model: Any, *, tokens: int, device_memory: int | str, host_memory: int | str, batch: int = 1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, split: Split | Literal["auto"] = "auto",
        recent: int = RECENT, chunk_memory: int | str = "8 MiB", rates: Rates | None = None, workers: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(config=model.config)
        config = model.config.get_text_config(decoder=True)
        divided = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not divided:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no layer of full attention with a growing cache: {', '.join(map(repr, self.layers))}",
                where="CooperativeCache",
                fix="Use the model's own cache.",
            )
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        dtype = dtype or model.dtype
        shape = CacheShape(
            layers=len(divided), batch=batch, heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads, width=width,
            value_width=width, itemsize=dtype.itemsize,
        )  # fmt: skip
        machine = machine_for(torch.device(device or model.device))
        chunk_bytes = parse_size(chunk_memory, field="chunk_memory")
        self.plan = plan_cache(
            shape, tokens, device_bytes=parse_size(device_memory, field="device_memory"),
            host_bytes=parse_size(host_memory, field="host_memory"), split=split, recent=recent, chunk_bytes=chunk_bytes,
            rates=rates or measure_rates(machine, shape, dtype, chunk_bytes=chunk_bytes, workers=workers),
        )  # fmt: skip
        self.store = TieredCache.from_plan(self.plan, machine, dtype, workers=workers)
        for place, index in enumerate(divided):
            self.layers[index] = CooperativeLayer(self.store, place)


class CooperativeLayer(DynamicLayer):
    """One layer of the cache: a `DynamicLayer` whose keys and values are handles.

    Args:
        store: keys and values of all layers.
        place: of this layer in it.
    """

    supports_early_init = False

    def __init__(self, store: TieredCache, place: int) -> None:
        super().__init__()
        self.store, self.place = store, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remembers dtype and device; memory is there already."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens; returns handles of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(self.place, key_states, value_states)
        return self._handles()

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.store.layers[self.place].length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, as for a plain layer."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        self.store.layers[self.place].crop(max(0, self.get_seq_length() + tokens_to_remove))
        self._handles()

    def reset(self) -> None:
        """Hold nothing; the memory stays for the next sequence."""
        self.store.layers[self.place].crop(0)
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows exchanged."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._select(torch.arange(self.store.layers[self.place].batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows only."""
        self._select(torch.arange(self.store.layers[self.place].batch)[indices.cpu()])

    def offload(self) -> None:
        """Nothing: what belongs on the host is there."""

    def prefetch(self) -> None:
        """Nothing: the host's part is attended where it is."""

    def _select(self, rows: Tensor) -> None:
        if self.get_seq_length():
            self.store.layers[self.place].select(rows)
            self._handles()

    def _handles(self) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.keys = TieredTensor(self.store, self.place, "keys")
            self.values = TieredTensor(self.store, self.place, "values")
        return self.keys, self.values
