"""Which keys and values lie on the device, which on the host, and how long a token will take.

Letters: L layers, B sequences, S tokens, kappa bytes of keys and values of one token in one layer, N = B * S * kappa; Wd, Wc, Wl the rates
at which attention on the device, attention on the host, and the link between them move bytes; tau the time to wake the host. Of a layer's
N bytes the host holds the share f, and the device reads the share g of N over the link in each step. The three work at the same time:

    seconds of a layer = max(N (1 - f + g) / Wd,  N (f - g) / Wc + tau,  N g / Wl)

Where the host stores numbers of r times the bytes, Wc / r and Wl / r take the place of Wc and Wl. What the host has no memory for, the
share d of N, comes from a disk in every step, beside everything else: N d r / Wdisk joins the maximum.

All ways to divide a cache are cases of it. "token": every layer has the same f, so device and host work in every layer. "layer": f
is 0 for some layers and 1 for the others, as in the cooperative strategy of H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs
and Low-resource GPUs", 2024: while one works the other idles. "upload": g = f, the host only stores. "head": as "token", in
steps of one key head, so never predicted to be faster; but nothing moves between the sides. With x = f - g, the share attended on
the host, the time is convex and piecewise linear in x, so the best x is at an end or where two of the lines cross; f = max(f_min, x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torchwrap.attention.cooperative.disk import block_nbytes
from torchwrap.attention.cooperative.heads import HeadRoom
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.core import errors
from torchwrap.core.config import format_bytes

__all__ = ["CacheShape", "Plan", "Rates", "Split", "plan_cache"]

Split = Literal["token", "layer", "upload", "head"]
HOST_SHARE = 0.9  # of the host memory given; the rest is for queries, results and the program
RECENT = 4096
PREFILL = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """Keys and values of one model: layers, sequences, heads, widths, and bytes of one number (on the host None: the same)."""

    layers: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    itemsize: int
    host_itemsize: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every sequence in one layer: B * kappa."""
        return self.batch * self.kv_heads * (self.width + self.value_width) * self.itemsize

    @property
    def host_token_bytes(self) -> int:
        """The same as the host stores it."""
        return self.token_bytes // self.itemsize * (self.host_itemsize or self.itemsize)

    @property
    def prompt_bytes(self) -> int:
        """Bytes that attention takes for each token of a prompt: queries, results in two dtypes, and new keys and values."""
        return self.batch * self.heads * ((self.width + self.value_width) * self.itemsize + 2 * 4 * self.value_width) + self.token_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine does in a second.

    Attributes:
        device: bytes of keys and values that attention on the device reads.
        host: the same for attention on the host, all its threads together.
        link: bytes from host to device.
        wake_s: seconds from a query on the device to the host's work on it and back, without that work.
        shared_memory: uploads and the host's attention draw on the same memory, so that each upload slows the host down.
        flops: floating-point operations of attention on the device; decides how long prompt chunks must be. 0: unknown.
        disk: bytes from disk to host.
    """

    device: float
    host: float
    link: float
    wake_s: float = 40e-6
    shared_memory: bool = False
    flops: float = 0.0
    disk: float = 1e9

    def host_while(self, streaming: bool) -> float:
        """Rate of the host's attention, with or without uploads beside it."""
        return max(self.host - self.link, self.host / 10) if streaming and self.shared_memory else self.host


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One division of a cache, what it takes and what it gives.

    Attributes:
        shape: whose keys and values.
        tokens: longest sequence.
        rates: of the machine.
        split: how the layers are divided.
        device_tokens: for each layer, tokens that its memory on the device holds.
        recent: how many of those are the most recent ones; the others are the first.
        spill: tokens that go to the host at a time.
        streamed: share of the host's tokens, in [0, 1], that a decode step reads over the link.
        chunk_tokens: tokens in one of the two staging buffers.
        prefill_tokens: tokens of a prompt to process at a time.
        device_heads: for each layer, key heads on the device where the split is by head; otherwise empty.
        host_limit: tokens that the host's memory holds for a layer, if the others are on the disk; None: all.
        block: tokens that move to the disk at a time.
    """

    shape: CacheShape
    tokens: int
    rates: Rates
    split: Split
    device_tokens: tuple[int, ...]
    recent: int
    spill: int
    streamed: float
    chunk_tokens: int
    prefill_tokens: int
    device_heads: tuple[int, ...] = ()
    host_limit: int | None = None
    block: int = 0

    def host_heads(self, layer: int) -> int:
        """Key heads of a layer that have tokens on the host."""
        if self.device_heads:
            return self.shape.kv_heads - self.device_heads[layer]
        return self.shape.kv_heads if self.device_tokens[layer] < self.tokens else 0

    def moved_tokens(self, layer: int) -> int:
        """Tokens that host and disk hold for a layer: after a spill the device holds `spill` fewer than it could."""
        if not self.host_heads(layer):
            return 0
        return self.tokens if self.device_heads else self.tokens - max(0, self.device_tokens[layer] - self.spill)

    def host_tokens(self, layer: int) -> int:
        """Tokens that the host's memory holds for a layer."""
        moved = self.moved_tokens(layer)
        return moved if self.host_limit is None else min(moved, self.host_limit)

    def disk_tokens(self, layer: int) -> int:
        """Tokens that the disk holds for a layer, whole blocks."""
        return -(-(self.moved_tokens(layer) - self.host_tokens(layer)) // self.block) * self.block if self.host_limit is not None else 0

    def room(self, layer: int) -> Room | HeadRoom:
        """How much of a layer goes where."""
        host, block = self.host_tokens(layer), self.block if self.disk_tokens(layer) else 0
        if not self.host_heads(layer):
            return Room(self.tokens, 0, self.spill, 0, False)
        if not self.device_heads:
            kept = self.device_tokens[layer]
            return Room(kept, min(self.recent, kept), self.spill, host, True, block)
        moved = Room(0, 0, 1, host, True, block)
        return HeadRoom(self.device_heads[layer], Room(self.tokens, 0, 1, 0, False), moved) if self.device_heads[layer] else moved

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffers that all layers share: two of the host's dtype, and one where that is another than the device's."""
        shape = self.shape
        passing = max(self.host_heads(layer) for layer in range(shape.layers)) * self.chunk_tokens
        wide = shape.token_bytes if shape.host_token_bytes != shape.token_bytes else 0
        return passing * (2 * shape.host_token_bytes + wide) // shape.kv_heads

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: every layer's share and the staging buffers."""
        if self.device_heads:
            return sum(self.device_heads) * self.tokens * self.shape.token_bytes // self.shape.kv_heads + self.staging_bytes
        return sum(self.device_tokens) * self.shape.token_bytes + self.staging_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory: keys and values, and two blocks on their way from the disk."""
        layers = range(self.shape.layers)
        held = sum(self.host_tokens(layer) * self.host_heads(layer) for layer in layers) * self.shape.host_token_bytes
        passing = max(self.block * self.host_heads(layer) for layer in layers) * self.shape.host_token_bytes if self.disk_bytes else 0
        return (held + 2 * passing) // self.shape.kv_heads

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk."""
        shape, total = self.shape, 0
        for layer in range(shape.layers):
            if blocks := self.disk_tokens(layer) // max(1, self.block):
                each = shape.batch * self.host_heads(layer) * self.block * (shape.host_itemsize or shape.itemsize)
                total += blocks * block_nbytes(each * shape.width, each * shape.value_width)
        return total

    @property
    def seconds(self) -> float:
        """Predicted seconds of attention of one decode step with a full cache."""
        return math.fsum(self._seconds_of(layer) for layer in range(self.shape.layers))

    def _seconds_of(self, layer: int) -> float:
        heads = self.shape.kv_heads
        held = self.host_heads(layer) / heads if self.device_heads else 1 - min(self.device_tokens[layer], self.tokens) / self.tokens
        disk = self.disk_tokens(layer) / self.tokens * self.host_heads(layer) / heads
        nbytes, chunk = self.tokens * self.shape.token_bytes, self.chunk_tokens * self.shape.token_bytes
        return _layer_seconds(nbytes, held, min(disk, held), self.streamed, _stored(self.rates, self.shape), chunk)

    def explain(self) -> str:
        """The plan in words, with its numbers."""
        layers = range(self.shape.layers)
        host = [self.tokens if self.device_heads else self.tokens - self.device_tokens[layer] for layer in layers if self.host_heads(layer)]
        disk = f", {format_bytes(self.disk_bytes)} on the disk" if self.disk_bytes else ""
        heads = f" of {max(self.host_heads(layer) for layer in layers)} of {self.shape.kv_heads} key heads" if self.device_heads else ""
        return (
            f"{self.tokens} tokens, split by {self.split}: {format_bytes(self.device_bytes)} on the device, "
            f"{format_bytes(self.host_bytes)} on the host{disk}; {len(host)} of {self.shape.layers} layers with up to "
            f"{max(host, default=0)} tokens{heads} there, of which {self.streamed:.1%} are read over the link; "
            f"{self.seconds * 1e3:.3g} ms of attention for a token; prompts in chunks of {self.prefill_tokens} tokens"
        )


def plan_cache(
    shape: CacheShape,
    tokens: int,
    *,
    device_bytes: int,
    host_bytes: int,
    disk_bytes: int = 0,
    rates: Rates,
    split: Split | Literal["auto"] = "auto",
    kept_bytes: int | None = None,
    recent: int = RECENT,
    chunk_bytes: int = 8 << 20,
    block_bytes: int = 8 << 20,
    prefill_tokens: int | Literal["auto"] = "auto",
    prefill_bytes: int | None = None,
) -> Plan:
    """Divide a cache of `tokens` tokens between device, host and disk.

    Args:
        shape: of the cache.
        tokens: longest sequence, prompt and answer together; at least 1.
        device_bytes: what the device has for keys, values and staging.
        host_bytes: what the host has; a tenth of it is left alone.
        disk_bytes: what a disk has for what neither has memory for.
        rates: measured or given.
        split: "auto" takes the fastest by prediction.
        kept_bytes: keys and values that may stay on the device, although more might fit; None: all that fit.
        recent: most recent tokens that stay on the device whatever the split, if they fit; not by head, where all tokens of a head do.
        chunk_bytes: size of one of two staging buffers.
        block_bytes: what moves to the disk and comes from it at a time.
        prefill_tokens: tokens of a prompt to process at a time; "auto": enough to hide the link behind computing, at least 2048.
        prefill_bytes: memory of the device for them, by which "auto" is bounded; None: any.

    Raises:
        PlanError: device, host and disk together are too small; nothing was allocated.
    """
    if tokens < 1 or min(shape.layers, shape.batch, shape.kv_heads, shape.token_bytes) < 1:
        raise errors.ConfigError(f"a cache of {tokens} tokens and {shape}", where="plan_cache", fix="Give positive numbers.")
    if prefill_tokens != "auto" and prefill_tokens < 1:
        raise errors.ConfigError(f"prompts in chunks of {prefill_tokens} tokens", where="prefill_chunk", fix='Give at least 1, or "auto".')
    prefill = _prefill_tokens(shape, rates, prefill_bytes) if prefill_tokens == "auto" else prefill_tokens
    whole = shape.layers * tokens * shape.token_bytes
    chunk = max(1, min(chunk_bytes // shape.token_bytes, tokens))
    wide = shape.token_bytes if shape.host_token_bytes != shape.token_bytes else 0
    staging = chunk * (2 * shape.host_token_bytes + wide)
    most_kept = whole if kept_bytes is None else kept_bytes
    room = device_bytes if whole <= min(device_bytes, most_kept) else device_bytes - staging
    if room < 0:
        raise errors.PlanError(
            f"the device has {format_bytes(device_bytes)} for keys and values, and two staging buffers alone take {format_bytes(staging)}",
            where="plan_cache",
            fix=f"Lower chunk_bytes, now {chunk_bytes}, or free memory on the device.",
        )
    plans, most = list[Plan](), int(HOST_SHARE * host_bytes)
    for kind in ("token", "layer", "upload") if split == "auto" else (split,):
        for kept, heads, streamed in _divisions(kind, shape, tokens, min(room, most_kept), _stored(rates, shape)):
            window = min(recent, max(min(kept) // 2, min(kept) - 1, 0)) if kind != "layer" else recent
            plan = Plan(
                shape=shape, tokens=tokens, rates=rates, split=kind, device_tokens=kept, recent=window, spill=max(1, min(256, window // 4)),
                streamed=streamed, chunk_tokens=chunk, prefill_tokens=prefill, device_heads=heads,
            )  # fmt: skip
            plans.append(plan if plan.host_bytes <= most else _with_disk(plan, most, block_bytes))
    fitting = [plan for plan in plans if plan.host_bytes <= most and plan.disk_bytes <= disk_bytes]
    if not fitting:
        least = min(plans, key=lambda plan: plan.host_bytes + plan.disk_bytes)
        beyond = f" and {format_bytes(least.disk_bytes)} on a disk with {format_bytes(disk_bytes)}" if disk_bytes else ""
        alone = replace(least, host_limit=None).host_bytes if not disk_bytes else least.host_bytes
        raise errors.PlanError(
            f"keys and values of {tokens} tokens take {format_bytes(whole)}: beside {format_bytes(device_bytes)} on the device they need "
            f"{format_bytes(alone)} on the host, of which {format_bytes(most)} may be used{beyond}",
            where="plan_cache",
            fix="Shorten the sequence, lower the batch size, or give more memory, or a disk.",
        )
    return min(fitting, key=lambda plan: plan.seconds)


def _with_disk(plan: Plan, host_bytes: int, block_bytes: int) -> Plan:
    """The plan with as many whole blocks in the host's memory as there is room for, and the others on a disk."""
    shape = plan.shape
    heads = [plan.host_heads(layer) for layer in range(shape.layers)]
    each = shape.host_token_bytes * max(heads) // shape.kv_heads  # bytes of a token in the layer that has most
    block = max(1, min(block_bytes // each, plan.tokens))
    blocks = host_bytes // (block * each)
    # Two of them are on their way from the disk, and of every layer one must be there to be filled.
    count = max(1, (blocks - 2) * max(heads) // sum(heads))
    return replace(plan, host_limit=count * block, block=block)


def _stored(rates: Rates, shape: CacheShape) -> Rates:
    """Rates at which host, link and disk move tokens, in bytes as the device stores them."""
    ratio = shape.token_bytes / shape.host_token_bytes
    return replace(rates, host=rates.host * ratio, link=rates.link * ratio, disk=rates.disk * ratio)


Division = tuple[tuple[int, ...], tuple[int, ...], float]


def _divisions(split: Split, shape: CacheShape, tokens: int, room: int, rates: Rates) -> Iterator[Division]:
    """Candidates: tokens on the device for each layer, key heads there (split by head), and the share of the host's that is streamed."""
    layer_bytes = tokens * shape.token_bytes
    if split == "layer":
        near = min(shape.layers, room // layer_bytes)
        yield (tokens,) * near + (0,) * (shape.layers - near), (), 0.0
        return
    if split == "head":
        total = min(shape.layers * shape.kv_heads, room * shape.kv_heads // layer_bytes)
        for most in range(total + 1):
            each, more = divmod(most, shape.layers)
            heads = (each + 1,) * more + (each,) * (shape.layers - more)
            held = 1 - each / shape.kv_heads
            for share in _crossings(layer_bytes, held, rates):
                if share <= held and (more == 0 or most == total):  # layers alike, or all that fits
                    yield (0,) * shape.layers, heads, 1 - share / held if held else 0.0
        return
    most = min(tokens, room // (shape.layers * shape.token_bytes))
    least = 1 - most / tokens  # f_min: the smallest share of the host
    if split == "upload":
        yield (most,) * shape.layers, (), 1.0
        return
    for share in _crossings(layer_bytes, least, rates):
        if share > 0 and least == 0 and layer_bytes * share / rates.host < 4 * rates.wake_s:
            continue  # the cache fits on the device, and waking the host would cost more than it spares
        kept = min(most, math.floor(tokens * (1 - max(least, share))))
        yield (kept,) * shape.layers, (), 1 - share / (1 - kept / tokens) if share < least else 0.0


def _crossings(nbytes: int, least: float, rates: Rates) -> Iterator[float]:
    """Shares of the tokens to attend on the host at which the time can be smallest."""
    yield from (0.0, least, 1.0)
    wake = rates.wake_s / nbytes
    for host in {rates.host, rates.host_while(True)}:
        # (1 - x) / Wd = x / Wc + tau / N;  x / Wc + tau / N = (f - x) / Wl;  (1 - x) / Wd = (f - x) / Wl
        found = [(1 / rates.device - wake) / (1 / rates.device + 1 / host), (least / rates.link - wake) / (1 / rates.link + 1 / host)]
        if rates.device != rates.link:
            found.append((least / rates.link - 1 / rates.device) / (1 / rates.link - 1 / rates.device))
        yield from (x for x in found if 0 < x < 1)


def _layer_seconds(nbytes: int, held: float, disk: float, streamed: float, rates: Rates, chunk: int) -> float:
    """Seconds of one layer: the share `held` is not on the device, of it `disk` on the disk; of the others `streamed` crosses the link."""
    uploaded = nbytes * (held - disk) * streamed
    here, there = nbytes * (1 - held) + uploaded, nbytes * held - uploaded
    host = there / rates.host_while(uploaded > 0) + rates.wake_s if there > 0 else 0.0
    read = nbytes * disk / rates.disk + rates.wake_s if disk else 0.0
    # The last chunk is attended after it has arrived.
    return max(here / rates.device, host, read, uploaded / rates.link + min(chunk, uploaded) / rates.device)


def _prefill_tokens(shape: CacheShape, rates: Rates, most_bytes: int | None) -> int:
    """Tokens of a prompt chunk from which on computing hides the link, C >= F Hkv e / (2 Hq Wl), or as many as there is memory for.

    A chunk of C queries does 4 C Hq D operations for each key, and each key costs 2 Hkv D e bytes of the link.
    """
    hidden = rates.flops * shape.kv_heads * (shape.host_itemsize or shape.itemsize) / (2 * shape.heads * rates.link)
    wanted = 512 * math.ceil(max(PREFILL, hidden) / 512)
    if most_bytes is None or wanted * shape.prompt_bytes <= most_bytes:
        return wanted
    fitting = most_bytes // shape.prompt_bytes
    return fitting // 512 * 512 or max(1, fitting)
