"""Which keys and values lie on the device, which on the host, and how long a token will take.

Letters: L layers, B sequences, S tokens, kappa bytes of keys and values of one token in one layer, N = B * S * kappa; Wd, Wc, Wl the rates
at which attention on the device, attention on the host, and the link between them move bytes; tau the time to wake the host. Of a layer's
N bytes the host holds the share f, and the device reads the share g of N over the link in each step. The three work at the same time:

    seconds of a layer = max(N (1 - f + g) / Wd,  N (f - g) / Wc + tau,  N g / Wl)

All three ways to divide a cache are cases of it. "token": every layer has the same f, so device and host work in every layer. "layer": f
is 0 for some layers and 1 for the others, as in the cooperative strategy of H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs
and Low-resource GPUs", 2024: while one works the other idles. "upload": g = f, the host only stores. With x = f - g, the share attended on
the host, the time is convex and piecewise linear in x, so the best x is at an end or where two of the lines cross; f = max(f_min, x).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torchwrap.core import errors
from torchwrap.core.config import format_bytes

__all__ = ["CacheShape", "Plan", "Rates", "Split", "plan_cache"]

Split = Literal["token", "layer", "upload"]
HOST_SHARE = 0.9  # of the host memory given; the rest is for queries, results and the program
RECENT = 4096
PREFILL = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """Keys and values of one model: layers, sequences, heads, widths, and bytes of one number."""

    layers: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every sequence in one layer: B * kappa."""
        return self.batch * self.kv_heads * (self.width + self.value_width) * self.itemsize


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
    """

    device: float
    host: float
    link: float
    wake_s: float = 40e-6
    shared_memory: bool = False
    flops: float = 0.0

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

    def host_tokens(self, layer: int) -> int:
        """Tokens that the host's memory holds for a layer: after a spill the device holds `spill` fewer than it could."""
        kept = self.device_tokens[layer]
        return 0 if kept >= self.tokens else self.tokens - max(0, kept - self.spill)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the two staging buffers, which all layers share."""
        return 2 * self.chunk_tokens * self.shape.token_bytes if min(self.device_tokens) < self.tokens else 0

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: every layer's share and the staging buffers."""
        return sum(self.device_tokens) * self.shape.token_bytes + self.staging_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes on the host."""
        return sum(self.host_tokens(layer) for layer in range(self.shape.layers)) * self.shape.token_bytes

    @property
    def seconds(self) -> float:
        """Predicted seconds of attention of one decode step with a full cache."""
        chunk = self.chunk_tokens * self.shape.token_bytes
        times = (
            _layer_seconds(self.tokens * self.shape.token_bytes, 1 - min(kept, self.tokens) / self.tokens, self.streamed, self.rates, chunk)
            for kept in self.device_tokens
        )
        return math.fsum(times)

    def explain(self) -> str:
        """The plan in words, with its numbers."""
        host = [self.tokens - kept for kept in self.device_tokens if kept < self.tokens]
        return (
            f"{self.tokens} tokens, split by {self.split}: {format_bytes(self.device_bytes)} on the device, "
            f"{format_bytes(self.host_bytes)} on the host; {len(host)} of {self.shape.layers} layers with up to "
            f"{max(host, default=0)} tokens there, of which {self.streamed:.1%} are read over the link; "
            f"{self.seconds * 1e3:.3g} ms of attention for a token; prompts in chunks of {self.prefill_tokens} tokens"
        )


def plan_cache(
    shape: CacheShape,
    tokens: int,
    *,
    device_bytes: int,
    host_bytes: int,
    rates: Rates,
    split: Split | Literal["auto"] = "auto",
    recent: int = RECENT,
    chunk_bytes: int = 8 << 20,
    prefill_tokens: int | Literal["auto"] = "auto",
) -> Plan:
    """Divide a cache of `tokens` tokens between device and host.

    Args:
        shape: of the cache.
        tokens: longest sequence, prompt and answer together; at least 1.
        device_bytes: what the device has for keys, values and staging.
        host_bytes: what the host has; a tenth of it is left alone.
        rates: measured or given.
        split: "auto" takes the fastest by prediction.
        recent: most recent tokens that stay on the device whatever the split, if they fit.
        chunk_bytes: size of one of two staging buffers.
        prefill_tokens: tokens of a prompt to process at a time; "auto": enough to hide the link behind computing, at least 2048.

    Raises:
        PlanError: device and host together are too small; nothing was allocated.
    """
    if tokens < 1 or min(shape.layers, shape.batch, shape.kv_heads, shape.token_bytes) < 1:
        raise errors.ConfigError(f"a cache of {tokens} tokens and {shape}", where="plan_cache", fix="Give positive numbers.")
    if prefill_tokens != "auto" and prefill_tokens < 1:
        raise errors.ConfigError(f"prompts in chunks of {prefill_tokens} tokens", where="prefill_chunk", fix='Give at least 1, or "auto".')
    prefill = _prefill_tokens(shape, rates) if prefill_tokens == "auto" else prefill_tokens
    whole = shape.layers * tokens * shape.token_bytes
    chunk = max(1, min(chunk_bytes // shape.token_bytes, tokens))
    room = device_bytes if whole <= device_bytes else device_bytes - 2 * chunk * shape.token_bytes
    if room < 0:
        raise errors.PlanError(
            f"the device has {format_bytes(device_bytes)} for keys and values, and two staging buffers alone take "
            f"{format_bytes(2 * chunk * shape.token_bytes)}",
            where="plan_cache",
            fix=f"Lower chunk_bytes, now {chunk_bytes}, or free memory on the device.",
        )
    plans: list[Plan] = []
    for kind in ("token", "layer", "upload") if split == "auto" else (split,):
        for kept, streamed in _divisions(kind, shape, tokens, room, rates):
            window = min(recent, max(min(kept) // 2, min(kept) - 1, 0)) if kind != "layer" else recent
            plan = Plan(
                shape=shape, tokens=tokens, rates=rates, split=kind, device_tokens=kept, recent=window, spill=max(1, min(256, window // 4)),
                streamed=streamed, chunk_tokens=chunk, prefill_tokens=prefill,
            )  # fmt: skip
            plans.append(plan)
    fitting = [plan for plan in plans if plan.host_bytes <= HOST_SHARE * host_bytes]
    if not fitting:
        least = min(plans, key=lambda plan: plan.host_bytes)
        raise errors.PlanError(
            f"keys and values of {tokens} tokens take {format_bytes(whole)}: beside {format_bytes(device_bytes)} on the device they need "
            f"{format_bytes(least.host_bytes)} on the host, of which {format_bytes(int(HOST_SHARE * host_bytes))} may be used",
            where="plan_cache",
            fix="Shorten the sequence, lower the batch size, or give more memory.",
        )
    return min(fitting, key=lambda plan: plan.seconds)


def _divisions(split: Split, shape: CacheShape, tokens: int, room: int, rates: Rates) -> Iterator[tuple[tuple[int, ...], float]]:
    """Candidates: tokens on the device for each layer, and the share of the host's that is streamed."""
    layer_bytes = tokens * shape.token_bytes
    if split == "layer":
        near = min(shape.layers, room // layer_bytes)
        yield (tokens,) * near + (0,) * (shape.layers - near), 0.0
        return
    most = min(tokens, room // (shape.layers * shape.token_bytes))
    least = 1 - most / tokens  # f_min: the smallest share of the host
    if split == "upload":
        yield (most,) * shape.layers, 1.0
        return
    for share in _crossings(layer_bytes, least, rates):
        if share > 0 and least == 0 and layer_bytes * share / rates.host < 4 * rates.wake_s:
            continue  # the cache fits on the device, and waking the host would cost more than it spares
        kept = min(most, math.floor(tokens * (1 - max(least, share))))
        yield (kept,) * shape.layers, 1 - share / (1 - kept / tokens) if share < least else 0.0


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


def _layer_seconds(nbytes: int, held: float, streamed: float, rates: Rates, chunk: int) -> float:
    """Seconds of one layer with the share `held` on the host, of which `streamed` crosses the link."""
    uploaded = nbytes * held * streamed
    here, there = nbytes * (1 - held) + uploaded, nbytes * held - uploaded
    host = there / rates.host_while(uploaded > 0) + rates.wake_s if there > 0 else 0.0
    # The last chunk is attended after it has arrived.
    return max(here / rates.device, host, uploaded / rates.link + min(chunk, uploaded) / rates.device)


def _prefill_tokens(shape: CacheShape, rates: Rates) -> int:
    """Tokens of a prompt chunk from which on computing hides the link: C >= F Hkv e / (2 Hq Wl).

    A chunk of C queries does 4 C Hq D operations for each key, and each key costs 2 Hkv D e bytes of the link.
    """
    hidden = rates.flops * shape.kv_heads * shape.itemsize / (2 * shape.heads * rates.link)
    return 512 * math.ceil(max(PREFILL, hidden) / 512)
