"""transformers' continuous batching with a wrapped model: a stand-in that asks for packed sequences, and attention over its paged cache.

Continuous batching (transformers 5.23) packs many requests into one row and makes a dense mask of all their queries times all their keys,
unless the name of the attention in the config contains "flash"; any name but such and two of its own it refuses. Our name must not
contain it (see `attention`), and the manager asks at its construction and again in its own thread. So it gets a stand-in for the model,
which calls the model and answers like it, only that its config is a copy with another name. Nothing of the model changes while a manager
runs, and what else uses the model, in any thread, meets it as it is. All ways to a manager go by `init_continuous_batching` of the model.

A manager kept for the next session is kept on the stand-in: one that the model had before is there again afterwards.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from torchwrap.attention.packed import Packing, Part, assembled, attend_packed
from torchwrap.attention.pages import Pages
from torchwrap.attention.service import Service
from torchwrap.core.errors import ConflictError, UnsupportedModelError
from torchwrap.core.layer import Layer, held_back
from torchwrap.core.swap import original_class

__all__ = ["PACKED", "StandIn", "Step", "attend_paged", "steps"]

PACKED = "torchwrap_packed_flash"
"""What the stand-in's config says: "flash" without a version. It is in no registry, for no model carries it."""

_METHODS = ("init_continuous_batching", "destroy_cached_continuous_batching_manager")


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward is to do in the layers of one type of attention.

    Attributes:
        packing: how the sequences are taken apart.
        rows: of the cache, where all keys lie once the new ones are written; None: the cache hands keys out itself.
        pages: those of the sequences of one query, as runs; None with `rows`, or if there are none such.
    """

    packing: Packing
    rows: Tensor | None = None
    pages: Pages | None = None

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, allocator: Any, read: Tensor) -> Step:
        """From what transformers says of a forward.

        Args:
            queries: cumulative lengths.
            keys: cumulative lengths.
            allocator: of the layers' part of the cache.
            read: rows of all keys; none if nothing is read. A sliding window is read before it is written, with marks among its rows.
        """
        window = getattr(allocator, "sliding_window", None)
        packing = Packing.of(queries, keys, window=window)
        if window is not None or read.numel() == 0:
            return cls(packing)
        single = next((part for part in packing.parts if part.kind == "single"), None)
        if single is None:
            return cls(packing, read)
        rows = read[single.columns]
        first, end = (None, None) if single.mask is None else (single.mask.kv_start, single.mask.kv_end)
        if first is None or end is None:
            first, end = rows.new_tensor([0]), rows.new_tensor([len(rows)])
        return cls(packing, read, Pages.of(rows, first, end))


class StandIn:
    """A wrapped model as continuous batching is to see it.

    Args:
        fqn: name of the model.
        model: a model with `generate_batch`.
        layer: that says whether the model is served in this thread.
        service: who computes the model's attention.
        name: of the attention in the model's configs while it is served.
    """

    _cached_continuous_batching_manager: Any = None  # not that of the model

    def __init__(self, fqn: str, model: nn.Module, layer: Layer, service: Service, name: str) -> None:
        self.fqn, self.layer, self.service, self.name = fqn, layer, service, name
        self.model: Any = model
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.closed = False

    def open(self) -> None:
        """Stand in for the model."""
        self.closed = False
        for name in _METHODS:
            self.model.__dict__[name] = getattr(self, name)

    def busy(self) -> str | None:
        """Why the model cannot be given back now, or None."""
        running = sum(manager.is_running() for manager in self.managers)
        return f"continuous batching runs with it ({running} manager{'s' * (running > 1)})" if running else None

    def close(self) -> None:
        """Give the model back; a manager made here runs no more, and one that was kept is destroyed."""
        self.closed = True
        for name in _METHODS:
            if getattr(self.model.__dict__.get(name), "__self__", None) is self:
                del self.model.__dict__[name]
        self.destroy_cached_continuous_batching_manager()

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """In place of the model's: a manager of the stand-in; of the model itself if another attention was set since.

        Args:
            generation_config: as for the model's.
            continuous_batching_config: likewise; accelerator graphs are off where it does not say.
            workload_hints: likewise.

        Raises:
            ConflictError: within `torchwrap.disabled`, which the manager's thread would not hear of.
            UnsupportedModelError: accelerator graphs or compilation are asked for, or sequences are divided over processes.
        """
        if any(held is self.layer for held in held_back()):
            raise ConflictError(
                "continuous batching runs in a thread of its own, which disabled() does not reach", where=self.fqn or "the model",
                fix='Undo it for that: torchwrap.unwrap(model, "fast_attention").',
            )  # fmt: skip
        if not self._is_served():
            return self._own("init_continuous_batching", self.model)(generation_config, continuous_batching_config, workload_hints)
        if self.service.sequence is not None:
            raise UnsupportedModelError(
                "continuous batching packs whole sequences, and those of this model are divided over processes",
                where=self.fqn or "the model", fix="Leave sp_group out.",
            )  # fmt: skip
        generation = self.model.generation_config if generation_config is None else generation_config
        given = continuous_batching_config or getattr(generation, "continuous_batching_config", None) or ContinuousBatchingConfig()
        manager = self._own("init_continuous_batching")(generation_config, self._adjusted(given), workload_hints)
        self.managers.add(manager)
        return manager

    def destroy_cached_continuous_batching_manager(self) -> None:
        """In place of the model's: the manager that was kept here."""
        self._own("destroy_cached_continuous_batching_manager")()

    def _own(self, name: str, of: Any = None) -> Callable[..., Any]:
        """A method of the model's class, called of the stand-in, or of what is given."""
        method: Callable[..., Any] = getattr(original_class(self.model), name).__get__(self if of is None else of)
        return method

    def _is_served(self) -> bool:
        return not self.closed and bool(self.model.config.get_text_config()._attn_implementation_internal == self.name)

    def _adjusted(self, given: Any) -> Any:
        """Lengths are read by the host in every step, which neither a captured graph nor a compiled one can do."""
        asked = [name for name in ("varlen_compile_config", "decode_compile_config", "default_compile_level") if getattr(given, name)]
        asked += ["use_cuda_graph"] * any(given.cuda_graph_booleans)
        if asked:
            raise UnsupportedModelError(
                f"continuous batching of a wrapped model is neither captured nor compiled, and {', '.join(asked)} asks for it",
                where=self.fqn or "ContinuousBatchingConfig", fix="Leave it out.",
            )  # fmt: skip
        adjusted = copy.copy(given)
        adjusted.use_cuda_graph = False
        return adjusted

    @property
    def config(self) -> Any:
        """A copy of the model's."""
        made = copy.deepcopy(self.model.config)
        for config in {id(each): each for each in (made, made.get_text_config())}.values():
            config._attn_implementation_internal = PACKED
        return made

    def eval(self) -> StandIn:
        """The stand-in of the model in eval mode."""
        self.model.eval()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_served():  # it would get no mask
            raise ConflictError(
                "this manager was made with fast_attention on the model, which has been undone or replaced by another attention",
                where=self.fqn or "the model", fix="Make a new manager.",
            )  # fmt: skip
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:  # questions of copy and pickle are not for the model
            raise AttributeError(name)
        return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """Without managers: their threads and their cache stay with the original."""
        return {name: value for name, value in self.__dict__.items() if name not in ("managers", "_cached_continuous_batching_manager")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, managers=weakref.WeakSet())


# In a frame that Dynamo leaves alone, with what it calls: lengths are read.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def steps(kwargs: dict[str, Any]) -> dict[str, Step] | None:
    """What a call of a model is to do, by type of attention; None if it is none of continuous batching.

    Args:
        kwargs: of the call; those of transformers' `PagedAttentionArgs` are used.
    """
    cache = kwargs.get("cache")
    if not isinstance(cache, PagedAttentionCache):
        return None
    allocators: dict[str, Any] = cache.cache_allocators
    return {
        kind: Step.of(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"][kind], allocator, kwargs["read_index"][allocator.index])
        for kind, allocator in allocators.items()
    }


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_paged(
    fqn: str, service: Service, module: Any, query: Tensor, key: Tensor, value: Tensor, todo: dict[str, Step], kwargs: dict[str, Any],
    **options: Any,
) -> Tensor:  # fmt: skip
    """Write new keys and values to the cache, and attend each sequence within itself.

    Args:
        fqn: name of the module.
        service: who computes.
        module: an attention module; its `layer_idx` is the place in the cache.
        query: `(1, Hq, Sq, D)`, of all sequences.
        key: `(1, Hkv, Sq, D)`, new ones.
        value: `(1, Hkv, Sq, Dv)`, new ones.
        todo: from `steps` for this forward.
        kwargs: of the attention function, with those of `PagedAttentionArgs`.
        **options: `scale`, `softcap` and `sinks`.

    Returns:
        `(1, Hq, Sq, Dv)`.
    """
    cache: PagedAttentionCache = kwargs["cache"]
    allocator: Any = cache.layer_to_allocator[module.layer_idx]
    step = todo[allocator.layer_type]
    attend: Callable[..., Tensor] = partial(service.attend, fqn, **options)
    write = partial(cache.update, key_states=key, value_states=value, layer_idx=module.layer_idx)
    memory: list[Tensor] = []
    if step.rows is not None:
        memory = [pages.flatten(0, 1) for pages in allocator.get_cache_for_block_table(module.layer_idx)]
    if not memory or not service.reads_pages(query, memory[0], memory[1]):
        keys, values = write(kwargs=dict(kwargs))
        return attend_packed(query, keys, values, step.packing, attend)
    write(kwargs=kwargs | {"read_index": [rows[:0] for rows in kwargs["read_index"]]})  # and gather nothing

    def compute(part: Part, rows: Tensor) -> Tensor:
        if part.kind == "single":
            assert step.pages is not None
            return service.attend_pages(fqn, rows.transpose(0, 2), memory[0], memory[1], step.pages, **options).transpose(0, 2)
        if part.kind == "fresh":
            return attend(rows, key[:, :, part.rows], value[:, :, part.rows], mask=part.mask)
        assert step.rows is not None
        held = step.rows[part.columns]
        keys, values = (each.index_select(0, held).transpose(0, 1)[None] for each in memory)
        return attend(rows, keys, values, mask=part.mask)

    return assembled(query, step.packing, value.shape[3], compute)
