"""Attention on behalf of a model: `attend` with the settings of one wrapped model, and a record of which calls went where.

A model's attention modules call a function of ours; what they cannot be served with goes back to the model's own function, and the
settings say whether that is worth a warning or an error. Counters are kept outside compiled graphs only: a graph that reads a changing
number would be compiled anew for every call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from torchwrap.attention import node, pages
from torchwrap.attention.attend import attend
from torchwrap.attention.autocast import autocast
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cooperative.settings import CacheSettings
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.dispatch import choose, revision
from torchwrap.attention.distributed.deferred import Deferred
from torchwrap.attention.distributed.sequence import DividedSequence
from torchwrap.attention.distributed.tiled import Rows
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.prepared import prepared
from torchwrap.attention.settings import Settings, settings_of
from torchwrap.attention.transforms import keeps_results, recorded, unseen
from torchwrap.core.config import format_bytes
from torchwrap.core.errors import KernelError, TorchwrapWarning, UnsupportedModelError

if TYPE_CHECKING:
    from torchwrap.attention.cooperative.cache import TieredCache
    from torchwrap.attention.cooperative.rounding import Loss

__all__ = ["Service"]

_lock = threading.Lock()


class Service:
    """Calls of `attend` with one model's settings.

    Args:
        backend: as in `attend`: a name, or settings.
        fallback: what to do when a call has to go to the model's own attention: `warn` once per reason, `error` or `silent`.
        cache: `arena` or `cooperative` if growing caches are to write in place.
        cooperation: how caches are to be divided between device and host; None: they are not.
        tp_group: name of the group over which output projections are summed; None: that of the model's own mesh.
        allreduce_blocks: into how many blocks of rows a tensor-parallel model's attention is cut; 1: its own order.
        sequence: over which processes sequences are divided; None: they are whole.

    Attributes:
        served: `{(module, back end, kind of call): calls}`.
        reasons: `{(back end, kind of call): why that back end}`.
        left: `{(module, reason): calls}` that went to the model's own attention.
    """

    def __init__(
        self, backend: str | Settings = "auto", fallback: str = "warn", cache: str = "keep", *, cooperation: CacheSettings | None = None,
        tp_group: str | None = None, allreduce_blocks: int | Literal["auto"] = 1, sequence: DividedSequence | None = None,
    ) -> None:  # fmt: skip
        self.backend: str | Settings = backend
        self.fallback: str = fallback
        self.cache: str = cache
        self.cooperation: CacheSettings | None = cooperation
        self.tp_group: str | None = tp_group
        self.allreduce_blocks: int | Literal["auto"] = allreduce_blocks
        self.sequence: DividedSequence | None = sequence
        self.served: Counter[tuple[str, str, str]] = Counter()
        self.reasons: dict[tuple[str, str], str] = {}
        self._chosen: dict[tuple[str, int, int, int], str] = {}
        self.left: Counter[tuple[str, str]] = Counter()
        self._gathers: bool = False  # a kernel that reads pages has failed
        self._lossy: weakref.WeakSet[TieredCache] = weakref.WeakSet()  # caches that store less than they are given

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lossy": None}  # caches belong to the generations of this object, not of its copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lossy=weakref.WeakSet())

    def attend(
        self,
        where: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: TileMask | Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """As `torchwrap.attention.attend.attend`, for the module named `where`.

        Args:
            where: name of the module that asks, for the record.
            q: `[B, Hq, Sq, D]`.
            k: `[B, Hkv, Sk, D]`.
            v: `[B, Hkv, Sk, Dv]`.
            mask: what each query sees.
            scale: factor of the scores.
            softcap: bound of the scaled scores.
            sinks: `[Hq]`.
            bias: added to the scores.
            dropout: probability with which a weight becomes 0.

        Returns:
            `[B, Hq, Sq, Dv]`.
        """
        if keeps_results():
            with unseen():
                return self.attend(where, q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout)
        if self.sequence is not None:
            divided: Tensor = self.sequence.attend(
                where, q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend=self.backend
            )
            if not recorded():
                kind = _kind(q, k, mask, softcap, sinks, bias, dropout)
                self.reasons[self.sequence.way, kind] = f"sequences are divided over {self.sequence.size} processes"
                with _lock:
                    self.served[where, self.sequence.way, kind] += 1
            return divided
        if isinstance(k, TieredTensor):
            if k.cache.is_lossy:
                with _lock:
                    self._lossy.add(k.cache)
        else:
            q, k, v = autocast(q, k, v)  # here too: the record is of what is computed
        if sinks is bias is None and not torch.compiler.is_compiling():
            known = prepared(q, k, v, mask, scale, softcap, dropout, self.backend)
            if known is not None:
                found, _ = node.prepared(known, q, k, v, mask)
                known.kind = kind = known.kind or _kind(q, k, mask, softcap, sinks, bias, dropout)
                if (known.name, kind) not in self.reasons:
                    call = checked(q, k, v, mask=mask, scale=scale, softcap=softcap)
                    self.reasons[known.name, kind] = choose(replace(call, dropout=dropout), self.backend).reason + _mask_memory(call, mask)
                with _lock:
                    self.served[where, known.name, kind] += 1
                return found
        out: Tensor = attend(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend=self.backend
        )
        # Afterwards, because a back end may have failed and another one have computed it.
        if not recorded():
            kind = _kind(q, k, mask, softcap, sinks, bias, dropout)
            size = kind, q.shape[2].bit_length(), k.shape[2].bit_length(), revision()
            if size not in self._chosen:  # asked once for each kind and size class: the answer is for people
                if isinstance(k, TieredTensor):
                    name, reason = "cooperative", k.cache.reason
                else:
                    call = checked(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias)
                    choice = choose(replace(call, dropout=dropout), self.backend)
                    name, reason = choice.backend.name, choice.reason + _mask_memory(call, mask)
                self.reasons[name, kind] = reason
                self._chosen[size] = name
            with _lock:
                self.served[where, self._chosen[size], kind] += 1
        return out

    def reads_pages(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether `attend_pages` can take a call with these queries and memories.

        Args:
            q: `[N, Hq, 1, D]`, or any shape with these heads, width, dtype and device.
            k: `[S, Hkv, D]`.
            v: `[S, Hkv, Dv]`.
        """
        return not self._gathers and settings_of(self.backend).backend in ("auto", pages.reader(q)) and pages.refuses(q, k, v) is None

    def attend_pages(
        self, where: str, q: Tensor, k: Tensor, v: Tensor, held: pages.Pages, *, scale: float | None = None, softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `torchwrap.attention.pages.attend_pages`, for the module named `where`.

        Args:
            where: name of the module that asks, for the record.
            q: `[N, Hq, 1, D]`.
            k: `[S, Hkv, D]`; `reads_pages` has said yes to it.
            v: `[S, Hkv, Dv]`.
            held: where the keys of each sequence lie.
            scale: factor of the scores.
            softcap: bound of the scaled scores.
            sinks: `[Hq]`.

        Returns:
            `[N, Hq, 1, Dv]`.

        Raises:
            KernelError: the back end that was asked for cannot run.
        """
        try:
            out = pages.attend_pages(q, k, v, held, scale=scale, softcap=softcap, sinks=sinks)
        except KernelError as error:
            if settings_of(self.backend).backend != "auto":
                raise
            self._gathers = True
            warnings.warn(f"attention: keys in pages are gathered from now on: {error}", TorchwrapWarning, stacklevel=2)
            keys, values = (memory[held.rows.long()].transpose(0, 1).expand(len(q), -1, -1, -1) for memory in (k, v))
            return self.attend(where, q, keys, values, mask=held.mask, scale=scale, softcap=softcap, sinks=sinks)
        kind = ", ".join(["decode, pages", *["softcap"] * (softcap is not None), *["sinks"] * (sinks is not None), _name(q.dtype)])
        with _lock:
            name = pages.reader(q)
            self.reasons[name, kind] = "keys and values are read where they lie"
            self.served[where, name, kind] += 1
        return out

    def defer(self, where: str, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = None, **options: Any) -> Deferred:
        """As `attend`, for a projection that computes it in blocks of rows; each block is a call in the record.

        Args:
            where: name of the module that asks.
            q: `[B, Hq, Sq, D]`.
            k: `[B, Hkv, Sk, D]`.
            v: `[B, Hkv, Sk, Dv]`.
            mask: what each query sees.
            options: others of `attend`.

        Returns:
            `[B, Sq, Hq, Dv]`, not computed yet.
        """
        q, k, v = autocast(q, k, v)  # it is asked for its dtype before anything is computed
        return Deferred.of(Rows(q, k, v, mask, options, partial(self.attend, where)))

    def leave(self, where: str, reason: str, fix: str) -> None:
        """A call of the module named `where` goes to the model's own attention.

        Raises:
            UnsupportedModelError: the settings forbid it.
        """
        if torch.compiler.is_compiling():
            return
        if self.fallback == "error":
            raise UnsupportedModelError(f"fast_attention cannot serve this call: {reason}", where=where, fix=fix)
        with _lock:
            first = not any(reason == known for _, known in self.left)
            self.left[where, reason] += 1
        if first and self.fallback == "warn":
            warnings.warn(f"fast_attention leaves calls to the model's own attention: {reason}. {fix}", TorchwrapWarning, stacklevel=2)

    def stats(self) -> dict[str, Any]:
        """`{"served": {...}, "left": {...}}`, calls by module, back end and kind, as plain values.

        Where the host stores keys and values of living caches in a narrower dtype, also `{"lost": {dtype: bound}}`: by how much no number
        of a layer's result differs for that.
        """
        with _lock:
            served, left = dict(self.served), dict(self.left)
        lost = {str(loss.dtype).removeprefix("torch."): loss.bound for loss in self._losses()}
        return {
            "served": {" ".join(key): count for key, count in served.items()},
            "left": {" ".join(key): count for key, count in left.items()},
            **({"lost": lost} if lost else {}),
        }

    def _losses(self) -> list[Loss]:
        """The worst of each living cache, in order of their bounds."""
        with _lock:
            caches = list(self._lossy)
        return sorted((loss for cache in caches if (loss := cache.worst_loss) is not None), key=lambda loss: loss.bound)

    def explain(self) -> str:
        """The record for people, a line per back end and kind of call, then a line per reason; empty before the first call."""
        with _lock:
            served, left = dict(self.served), dict(self.left)
        calls: dict[tuple[str, str], Counter[str]] = {}
        for (where, backend, kind), count in served.items():
            calls.setdefault((f"{kind}: {backend}", self.reasons[backend, kind]), Counter())[where] += count
        for (where, reason), count in left.items():
            calls.setdefault(("the model's own attention", reason), Counter())[where] += count
        lines = [f"{what}: {by.total()} calls of {len(by)} modules ({why})" for (what, why), by in calls.items()]
        return "\n".join([*lines, *(f"keys and values on the host are {loss.explain()}" for loss in self._losses())])


def _mask_memory(call: Call, given: TileMask | Tensor | None) -> str:
    """What a mask takes that is no rule but a table, for people; empty for rules."""
    if call.mask is not None and call.mask.dictionary is not None:
        tiles = call.mask.dictionary
        return f"; a mask without a rule, kept as {len(tiles.tiles)} tiles in {format_bytes(tiles.codes.nbytes + tiles.tiles.nbytes)}"
    if given is not None and call.mask is None:
        return f"; a mask of floats, {format_bytes(given.nbytes)} as it was given"
    return ""


def _kind(
    q: Tensor, k: Tensor, mask: TileMask | Tensor | None, softcap: float | None, sinks: Tensor | None, bias: Tensor | None, dropout: float
) -> str:
    """What sets calls apart for the choice of a back end."""
    mode = "decode" if q.shape[2] == 1 else "chunked" if q.shape[2] < k.shape[2] else "prefill"
    if mask is None:
        seen = "unmasked"
    elif isinstance(mask, TileMask):
        seen = mask.plain or "composed mask"
    else:
        seen = "dense mask" if mask.dtype == torch.bool else "added mask"
    given = {"softcap": softcap is not None, "sinks": sinks is not None, "bias": bias is not None, "dropout": dropout > 0}
    given["keys on two sides"] = isinstance(k, TieredTensor)
    return ", ".join([mode, seen, *(name for name, there in given.items() if there), _name(q.dtype)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
