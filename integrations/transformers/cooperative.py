"""A growing cache of transformers with part of its keys and values on the host, attended there.

Only layers of full attention are divided; a sliding window is small and stays where the model keeps it. What the layers hand to the
model are `TieredTensor`s, which the attention function of `torchwrap.fast_attention` recognises; any other gathers them, with a warning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.machine import cores, free_on, machine_for
from torchwrap.attention.cooperative.measure import measure_disk, measure_rates
from torchwrap.attention.cooperative.planner import RECENT, CacheShape, Plan, Rates, Split, plan_cache
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.core.config import parse_size
from torchwrap.core.errors import ConfigError, UnsupportedModelError
from torchwrap.storage.limits import memory_available

__all__ = ["CooperativeCache", "CooperativeLayer", "keeps_latents", "plan_of_cache", "shape_of_cache"]


class CooperativeCache(DynamicCache):
    """A cache for `generate(past_key_values=...)` that may be larger than the device.

    Args:
        model: a transformers model; its config says how many layers and heads there are.
        tokens: longest sequence, prompt and answer together.
        device_memory: for keys and values on the device, as bytes or like "2 GiB"; None: 0.9 of what is free there.
        host_memory: the same on the host, of which 0.9 is used; None: what is free.
        batch: sequences at a time; beams and returned sequences count.
        device: where the model computes; None: where its parameters are.
        dtype: of keys and values; None: that of the model.
        kv_host: how much lies on the host, at least: "auto" for what the device has no memory for, or is predicted to be faster there; a
            share of all in [0.0, 1.0] (a float); bytes, or a size like "2 GiB"; None: nothing.
        kv_split: "token", "layer", "upload", "head", or "auto" for the fastest of the first three by prediction.
        kv_host_dtype: in which the host stores keys and values; None: `dtype`. A narrower one is lossy: `describe` has what it lost.
        kv_disk: most bytes, or a size, on a disk, for what neither side has memory for; None: nothing.
        kv_disk_path: where to make a private folder for that, which is gone with the cache; None: the system's for temporary files.
        kv_recent: most recent tokens that stay on the device.
        stream_chunk_mib: one of the two buffers on the device for what comes from the host, in MiB.
        host_threads: threads that attend on the host; None: one for each core, less one.
        prefill_chunk: tokens of a prompt to process at a time, or "auto".
        rates: of the machine; None: measured now, which takes a moment.

    Attributes:
        plan: what lies where, and the predicted time; `plan.prefill_tokens` is what `prefill_chunk_size` of `generate` should be.
        store: the keys and values.

    Raises:
        ConfigError: a value is out of its range.
        PlanError: the memory does not suffice; nothing stays allocated.
        DiskFullError: the disk has less room than the plan needs there.
        UnsafePathError: the folder for it is a link, somebody else's, or writable by others.
        UnsupportedModelError: the model has no layer of full attention with a cache of its own, or keeps latents in it.

    Exactness: tokens of greedy generation as with a cache on one device, up to rounding of sums in another order; with a narrower
        `kv_host_dtype` lossy.

    Example:
        >>> cache = CooperativeCache(model, tokens=131072, device_memory="2 GiB", host_memory="24 GiB")  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache, prefill_chunk_size=cache.plan.prefill_tokens)  # doctest: +SKIP
    """

    def __init__(
        self, model: Any, *, tokens: int, device_memory: int | str | None = None, host_memory: int | str | None = None, batch: int = 1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, kv_host: float | str | None = "auto",
        kv_split: Split | Literal["auto"] = "auto", kv_host_dtype: torch.dtype | None = None, kv_disk: int | str | None = None,
        kv_disk_path: str | None = None, kv_recent: int = RECENT, stream_chunk_mib: float = 8.0, host_threads: int | None = None,
        prefill_chunk: int | Literal["auto"] = "auto", rates: Rates | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=model.config)
        self.plan = plan_of_cache(
            model, tokens=tokens, device_memory=device_memory, host_memory=host_memory, batch=batch, device=device, dtype=dtype,
            kv_host=kv_host, kv_split=kv_split, kv_host_dtype=kv_host_dtype, kv_disk=kv_disk, kv_disk_path=kv_disk_path,
            kv_recent=kv_recent, stream_chunk_mib=stream_chunk_mib, host_threads=host_threads, prefill_chunk=prefill_chunk, rates=rates,
        )  # fmt: skip
        dtype = dtype or model.dtype
        disk = Disk(kv_disk_path, nbytes=self.plan.disk_bytes) if self.plan.disk_bytes else None
        self.store = TieredCache.from_plan(
            self.plan, machine_for(torch.device(device or model.device)), dtype, workers=_threads(host_threads),
            storage=_storage(kv_host_dtype, dtype), disk=disk,
        )  # fmt: skip
        divided = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        for place, index in enumerate(divided):
            self.layers[index] = CooperativeLayer(self.store, place)


    def describe(self) -> str:
        """What lies where, and what a narrower dtype on the host has lost so far; waits for the device."""
        loss = self.store.worst_loss
        return self.plan.explain() + (f"; {loss.explain()}" if loss is not None else "")


def plan_of_cache(
    model: Any, *, tokens: int, device_memory: int | str | None = None, host_memory: int | str | None = None, batch: int = 1,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, kv_host: float | str | None = "auto",
    kv_split: Split | Literal["auto"] = "auto", kv_host_dtype: torch.dtype | None = None, kv_disk: int | str | None = None,
    kv_disk_path: str | None = None, kv_recent: int = RECENT, stream_chunk_mib: float = 8.0, host_threads: int | None = None,
    prefill_chunk: int | Literal["auto"] = "auto", rates: Rates | None = None,
) -> Plan:  # fmt: skip
    """The plan that `CooperativeCache` would follow with the same arguments; nothing is allocated, but for measuring.

    Raises:
        ConfigError, PlanError, UnsupportedModelError: as `CooperativeCache`.
    """
    if min(tokens, batch) < 1:
        raise ConfigError(f"{batch} rows of {tokens} tokens", where="CooperativeCache", fix="Give at least one of each.")
    layers = DynamicCache(config=model.config).layers
    divided = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    dtype = dtype or model.dtype
    storage = _storage(kv_host_dtype, dtype)
    shapes = {shape_of_cache(model, index, batch, dtype, storage) for index in divided}
    lacking = None
    if not divided:
        lacking = f"has no layer of full attention with a growing cache: {', '.join(map(repr, layers))}"
    elif keeps_latents(model):
        lacking = "keeps latents in its cache, of which it makes the keys and values of all tokens in every step"
    elif len(shapes) > 1:
        lacking = f"has layers of full attention with keys of different shapes: {', '.join(map(repr, shapes))}"
    if lacking is not None:
        raise UnsupportedModelError(f"{type(model).__name__} {lacking}", where="CooperativeCache", fix="Use the model's own cache.")
    shape = replace(shapes.pop(), layers=len(divided))
    machine = machine_for(torch.device(device or model.device))
    chunk_bytes, workers = _chunk_bytes(stream_chunk_mib), _threads(host_threads)
    host = parse_size(host_memory, field="host_memory") if host_memory is not None else memory_available() or 0
    near = parse_size(device_memory, field="device_memory") if device_memory is not None else free_on(machine.device)
    if rates is None:
        rates = measure_rates(machine, shape, dtype, chunk_bytes=chunk_bytes, workers=workers, storage=storage)
        rates = rates if kv_disk is None else replace(rates, disk=_disk_rate(kv_disk_path))
    return plan_cache(
        shape, tokens, rates=rates, device_bytes=near, kept_bytes=_kept_bytes(kv_host, shape, tokens),
        host_bytes=0 if kv_host is None else host, disk_bytes=0 if kv_disk is None else parse_size(kv_disk, field="kv_disk"),
        split=kv_split, recent=kv_recent, chunk_bytes=chunk_bytes, prefill_tokens=prefill_chunk,
        prefill_bytes=_for_prompts(model, machine.device, near if device_memory is not None else 0, shape),
    )  # fmt: skip


class CooperativeLayer(DynamicLayer):
    """One layer of the cache: a `DynamicLayer` whose keys and values are handles.

    Args:
        store: keys and values of all layers.
        place: of this layer in it.
    """

    supports_early_init = False

    def __init__(self, store: TieredCache, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        self._select(torch.arange(self.store.layers[self.place].batch, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows only."""
        self._select(torch.arange(self.store.layers[self.place].batch, device="cpu")[indices.cpu()])

    def offload(self) -> None:
        """Nothing: what belongs on the host is there."""

    def prefetch(self) -> None:
        """Nothing: the host's part is attended where it is."""

    def _select(self, rows: Tensor) -> None:
        if self.get_seq_length():
            self.store.select_in(self.store.layers[self.place], rows)
            self._handles()

    def _handles(self) -> tuple[Tensor, Tensor]:
        keys, values = TieredTensor(self.store, self.place, "keys"), TieredTensor(self.store, self.place, "values")
        if self.is_initialized:
            self.keys, self.values = keys, values
        return keys, values


def _storage(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    if wanted is not None and (not wanted.is_floating_point or wanted.itemsize > dtype.itemsize):
        raise ConfigError(
            f"kv_host_dtype is {wanted} and the cache {dtype}", where="kv_host_dtype", fix="Give a floating dtype of no more bytes."
        )
    return None if wanted == dtype else wanted


def _disk_rate(folder: str | None) -> float:
    disk = Disk(folder)
    try:
        return measure_disk(disk)
    finally:
        disk.close()


def _for_prompts(model: Any, device: torch.device, budget: int, shape: CacheShape) -> int:
    """Bytes that a chunk of a prompt may take in attention: what is free beside the cache, less what the rest of a block takes of it."""
    free = max(0, free_on(device) - budget) if budget else free_on(device) // 9  # of the tenth that is left alone
    wide = max(4 * one.hidden_size + 3 * _between(one) for one in _configs(model))
    others = shape.batch * wide * shape.itemsize
    return int(free * shape.prompt_bytes // (shape.prompt_bytes + others))


def _between(config: Any) -> int:
    """Width of the widest MLP; Gemma 3n has one for each layer."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return width if isinstance(width, int) else max(width)


def keeps_latents(model: Any) -> bool:
    """Does the model cache latents, which are neither keys nor values (DeepSeek and its kind, in transformers 5.23)?"""
    return getattr(_configs(model)[0], "kv_lora_rank", None) is not None


def shape_of_cache(model: Any, layer: int, batch: int, dtype: torch.dtype, storage: torch.dtype | None = None) -> CacheShape:
    """Sizes of what one of a model's layers keeps, as its config says."""
    config = _configs(model)[layer]
    # A decoder that has an encoder beside it in its config (BART, Whisper) calls the encoder's heads by the other name.
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    kv_heads = heads if hasattr(config, "decoder_attention_heads") else getattr(config, "num_key_value_heads", None) or heads
    width = value_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if keeps_latents(model):
        kv_heads, width, value_width = 1, config.kv_lora_rank, config.qk_rope_head_dim
    return CacheShape(
        layers=1, batch=batch, heads=heads, kv_heads=kv_heads, width=width, value_width=value_width, itemsize=dtype.itemsize,
        host_itemsize=None if storage is None else storage.itemsize,
    )  # fmt: skip


def _configs(model: Any) -> list[Any]:
    """The config of each layer: in some models (Gemma 4) they have heads of their own."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "per_layer_config", None)  # transformers 5.23
    return list(found) if found else [config] * config.num_hidden_layers


def _chunk_bytes(mib: float) -> int:
    if not 0 < mib < 1 << 20:
        raise ConfigError(f"a staging buffer of {mib} MiB", where="stream_chunk_mib", fix="Give a positive number of MiB, such as 8.")
    return max(1, round(mib * (1 << 20)))


def _threads(count: int | None) -> int:
    if count is not None and count < 1:
        raise ConfigError(f"{count} threads", where="host_threads", fix="Give at least 1, or None for one for each core, less one.")
    return count or max(1, cores() - 1)


def _kept_bytes(kv_host: float | str | None, shape: CacheShape, tokens: int) -> int | None:
    """Bytes that may stay on the device when so much of all is to lie on the host; None: as many as fit."""
    whole = shape.layers * tokens * shape.token_bytes
    if kv_host is None or kv_host == "auto":
        return None
    if isinstance(kv_host, float):
        if not 0 <= kv_host <= 1:
            raise ConfigError(f"kv_host is {kv_host}", where="kv_host", fix="Give a share in [0.0, 1.0], bytes as an int, or a size.")
        there = round(kv_host * whole)
    else:
        there = parse_size(kv_host, field="kv_host") * shape.token_bytes // shape.host_token_bytes
    return max(0, whole - there)
