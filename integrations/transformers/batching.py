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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from torchwrap.attention.packed import Packing, attend_packed
from torchwrap.core.errors import ConflictError, UnsupportedModelError
from torchwrap.core.layer import Layer, held_back
from torchwrap.core.swap import original_class

__all__ = ["PACKED", "Packings", "StandIn", "attend_paged", "packings"]

PACKED = "torchwrap_packed_flash"
"""What the stand-in's config says: "flash" without a version. It is in no registry, for no model carries it."""

_METHODS = ("init_continuous_batching", "destroy_cached_continuous_batching_manager")

Packings = dict[str, Packing]
"""How the sequences of one forward are taken apart, by the type of a layer's attention."""


class StandIn:
    """A wrapped model as continuous batching is to see it.

    Args:
        fqn: name of the model.
        model: a model with `generate_batch`.
        layer: that says whether the model is served in this thread.
        name: of the attention in the model's configs while it is served.
    """

    _cached_continuous_batching_manager: Any = None  # not that of the model

    def __init__(self, fqn: str, model: nn.Module, layer: Layer, name: str) -> None:
        self.fqn, self.layer, self.name = fqn, layer, name
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
            UnsupportedModelError: accelerator graphs or compilation are asked for.
        """
        if any(held is self.layer for held in held_back()):
            raise ConflictError(
                "continuous batching runs in a thread of its own, which disabled() does not reach", where=self.fqn or "the model",
                fix='Undo it for that: torchwrap.unwrap(model, "fast_attention").',
            )  # fmt: skip
        if not self._is_served():
            return self._own("init_continuous_batching", self.model)(generation_config, continuous_batching_config, workload_hints)
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
def packings(kwargs: dict[str, Any]) -> Packings | None:
    """How the sequences of a call of a model are to be taken apart; None if it is none of continuous batching.

    Args:
        kwargs: of the call; those of transformers' `PagedAttentionArgs` are used.
    """
    cache = kwargs.get("cache")
    if not isinstance(cache, PagedAttentionCache):
        return None
    queries, found = kwargs["cu_seq_lens_q"], {}
    for kind, keys in kwargs["cu_seq_lens_k"].items():
        found[kind] = Packing.of(queries, keys, window=getattr(cache.cache_allocators[kind], "sliding_window", None))
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_paged(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packed: Packings, attend: Callable[..., Tensor], kwargs: dict[str, Any]
) -> Tensor:
    """Write new keys and values to the cache, and attend each sequence within itself.

    Args:
        module: an attention module; its `layer_idx` is the place in the cache.
        query: `(1, Hq, Sq, D)`, of all sequences.
        key: `(1, Hkv, Sq, D)`, new ones.
        value: `(1, Hkv, Sq, Dv)`, new ones.
        packed: from `packings` for this forward.
        attend: as in `attend_packed`.
        kwargs: of the attention function, with those of `PagedAttentionArgs`.

    Returns:
        `(1, Hq, Sq, Dv)`.
    """
    cache: PagedAttentionCache = kwargs["cache"]
    kind = cache.layer_to_allocator[module.layer_idx].layer_type
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=dict(kwargs))
    return attend_packed(query, key, value, packed[kind], attend)
