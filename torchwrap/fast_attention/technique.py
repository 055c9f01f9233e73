"""`torchwrap.fast_attention`: a model's attention, computed by `torchwrap.attention`.

What is found and how it is led elsewhere is knowledge about frameworks, and integrations have it. This file asks for it, in the model and
in models inside it (a tower in a module of the user's, a model inside an adapter's), adds torch's own modules, and keeps the way back.

Source: "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024 (arXiv 2410.16663): attention without stored scores or
masks where FlashAttention does not reach. Where we differ: any model as it is, training, and a choice of back end for each call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, TypeVar, cast, overload

from torch import nn

from torchwrap.attention.attend import attend
from torchwrap.attention.cache import ArenaPlan
from torchwrap.attention.cooperative.planner import Plan
from torchwrap.attention.distributed.sequence import DividedSequence, Way
from torchwrap.attention.distributed.works import group_size
from torchwrap.attention.divert import Diverted
from torchwrap.attention.service import Service
from torchwrap.core.errors import ConfigError, UnsupportedModelError
from torchwrap.core.integration import AttentionRoute, Integration, integration_for
from torchwrap.core.order import PHASES
from torchwrap.core.swap import original_class
from torchwrap.core.technique import Prepared, Technique, register
from torchwrap.core.transaction import applied, handle_of
from torchwrap.fast_attention import torch_modules
from torchwrap.fast_attention.config import FastAttention
from torchwrap.fast_attention.handle import FastAttentionHandle

__all__ = ["FastAttentionTechnique", "fast_attention"]

M = TypeVar("M", bound=nn.Module)


class FastAttentionTechnique(Technique[FastAttention]):
    """Computes a model's attention without storing scores or masks of queries times keys.

    Args:
        target: a module, a class or a factory of modules; nothing makes a decorator.
        config: a `FastAttention`, or its fields as keywords.

    Raises:
        UnsupportedModelError: the model has no attention that can be led elsewhere, or some of it cannot.
        ConfigError: a field is out of range.

    Exactness: allclose to the model's own attention: sums are taken in another order (float32 logits within 1e-4 on the models of the
        tests, gradients within twice the rounding of the definition). Rows of a batch that see no key give zeros.
    Cost: memory of one call grows with queries plus keys, not with their product; nothing is added to the model.

    Example:
        >>> import torch, torchwrap as tw
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = tw.fast_attention(torch.nn.TransformerEncoder(layer, 2).eval())
        >>> tuple(model(torch.ones(1, 5, 16)).shape)
        (1, 5, 16)
        >>> sum(tw.handle_of(model, "fast_attention").stats()["served"].values())
        2
        >>> _ = tw.unwrap(model)
    """

    name = "fast_attention"
    phase: ClassVar[int] = PHASES["fast_attention"]
    config_class = FastAttention
    exactness = "allclose: float32 outputs within 1e-4 of the model's own attention"
    attend = staticmethod(attend)  # the functional form, `torchwrap.fast_attention.attend(q, k, v)`

    def prepare(self, model: nn.Module, config: FastAttention, integration: Integration) -> Prepared[FastAttention]:
        """Find every attention module and how it is reached; touches nothing."""
        service = _service(config)
        routes = list(_routes("", model, service))
        served = {id(module) for route in routes for _, module, _ in route.places}
        own = torch_modules.route(model, service, served)
        if own.attends:
            own.notes.append(f"{len(own.attends)} modules that use nn.MultiheadAttention or scaled_dot_product_attention themselves")
            routes.append(own)
        if not any(route.attends for route in routes):
            raise _nothing_found(model, integration)
        if config.cache == "cooperative" and not any(route.generates for route in routes):
            raise UnsupportedModelError(
                f'cache="cooperative": no model in this {type(model).__name__} generates with a growing cache of the keys and values of '
                f"layers of full attention, as far as the {integration.name} integration knows",
                where=type(model).__name__,
                fix='Use cache="arena", the default.',
            )
        if service.sequence is not None and not all(route.divides for route in routes):
            raise UnsupportedModelError(
                f"the sequences of {type(model).__name__} cannot be divided over processes: nobody knows how its tokens meet",
                where="FastAttention.sp_group",
                fix="Leave sp_group out, or call torchwrap.attention.distributed.ring.ring_attend in the model's own code.",
            )
        layers = [place for route in routes for place in route.places]
        notes = [note for route in routes for note in route.notes]
        notes.extend(_beside(model, {fqn for route in routes for fqn in route.attends}))
        return Prepared(config=config, layers=layers, notes=notes, data=FastAttentionHandle(service, routes))

    def attach(self, model: nn.Module, prepared: Prepared[FastAttention]) -> FastAttentionHandle:
        """Switch the routes on; an error leaves the model as it was."""
        handle: FastAttentionHandle = prepared.data
        try:
            handle.open()
        except BaseException:
            handle.close()
            raise
        return handle

    @overload
    def scope(
        self, model: None = None, config: FastAttention | None = None, /, **options: object
    ) -> AbstractContextManager[FastAttentionHandle]: ...
    @overload
    def scope(self, model: M, config: FastAttention | None = None, /, **options: object) -> AbstractContextManager[M]: ...
    def scope(
        self, model: nn.Module | None = None, config: FastAttention | None = None, /, **options: object
    ) -> AbstractContextManager[Any]:
        """A block in which attention is computed here, without a model: every call of `F.scaled_dot_product_attention` by this thread.

        Blocks nest, the innermost serves; an error leaves nothing behind; other threads are not touched. What is checkpointed in a block
        is computed again by its backward, which therefore belongs in the block as well. With a model it is
        `torchwrap.applied(model, FastAttention(...))`. Code that torch.compile compiled is compiled once more for the block.

        Args:
            model: None: the calls of this thread.
            config: the settings as an object.
            **options: the settings as fields; not together with `config`.

        Returns:
            a context manager that gives a handle (`stats()`, `explain()`), with a model the model.

        Raises:
            ConfigError: a field is unknown, out of range, or of no effect without a model.

        Example:
            >>> import torch, torchwrap as tw
            >>> q = torch.randn(1, 2, 5, 8)
            >>> with tw.fast_attention.scope() as handle:
            ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            >>> sum(handle.stats()["served"].values())
            1
        """
        settings = self._settings(config, options)
        without = settings.said(FastAttention.OF_A_MODEL) if model is None else []
        if without:
            raise ConfigError(
                f"{', '.join(without)} would have no effect: scope() was given no model",
                where="fast_attention.scope",
                fix="Leave it out, or give the model.",
            )
        return _in_this_thread(settings) if model is None else applied(model, settings)

    def explain(self, model: nn.Module) -> str:
        """The handle's `explain()`: which back end computed which calls of a wrapped model, and why."""
        handle: FastAttentionHandle = handle_of(model, self.name)
        return handle.explain()

    def plan(self, model: nn.Module, *, tokens: int, batch: int = 1) -> Plan | ArenaPlan:
        """The handle's `plan()`: what a wrapped model's cache takes for such a sequence."""
        handle: FastAttentionHandle = handle_of(model, self.name)
        return handle.plan(tokens=tokens, batch=batch)

    def tune(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> str:
        """Call a wrapped model once, measure what was never measured on this machine, and say what computes its calls now.

        Args:
            model: as wrapped.
            *args: of the call.
            **kwargs: of the call.

        Raises:
            ConfigError: the model was wrapped with a named back end.

        Cost: some 8 calls of attention for each back end and kind of call.
        """
        handle: FastAttentionHandle = handle_of(model, self.name)
        with handle.tuning():
            model(*args, **kwargs)
        return handle.explain()


def _nothing_found(model: nn.Module, integration: Integration) -> UnsupportedModelError:
    named = [(fqn, type(module).__name__) for fqn, module in model.named_modules() if "Attention" in type(module).__name__]
    fix = "Call torchwrap.attention.attend.attend in the model's own code, or give the part of it that has attention."
    if named:
        fqn, kind = named[0]
        fix = (
            f"It has {kind}{f' ({fqn})' if fqn else ''}: if that was taken out of a model, give the whole model, whose configuration says "
            f"what computes its attention. {fix}"
        )
    return UnsupportedModelError(
        f"fast_attention: {type(model).__name__} has no attention that can be led elsewhere: looked for nn.MultiheadAttention, for "
        f"modules whose forward calls scaled_dot_product_attention, and for those known to the {integration.name} integration",
        where=type(model).__name__,
        fix=fix,
    )


def _beside(model: nn.Module, served: set[str]) -> list[str]:
    """What is called attention in the model and stays as it is: neither served, nor a part of what is, nor around it."""
    left = Counter[str]()
    for fqn, module in model.named_modules():
        kind = original_class(module).__name__
        related = any(fqn == name or fqn.startswith(f"{name}.") or name.startswith(f"{fqn}.") or not fqn for name in served)
        if "Attention" in kind and not related and next(module.children(), None) is not None:
            left[kind] += 1
    return [f"{count} {kind} left as they are: their code has no attention that can be led elsewhere" for kind, count in left.items()]


def _service(config: FastAttention) -> Service:
    return Service(
        config.settings(), config.fallback, config.cache, cooperation=config.cache_settings() if config.cache == "cooperative" else None,
        **_over_processes(config),
    )  # fmt: skip


@contextmanager
def _in_this_thread(config: FastAttention) -> Iterator[FastAttentionHandle]:
    service = _service(config)
    with Diverted("scope", service):
        yield FastAttentionHandle(service, [])


def _over_processes(config: FastAttention) -> dict[str, Any]:
    """The settings of a `Service` about groups of processes.

    Raises:
        ConfigError: there is no such group, this process is not in it, or the back end cannot compute parts.
    """
    settings: dict[str, Any] = {"tp_group": config.tp_group, "allreduce_blocks": config.allreduce_blocks}
    if config.sp_group is not None:
        sequence = DividedSequence(config.sp_group, cast("Way", config.ring))
        sequence.check_backend(config.backend)
        group_size(config.sp_group)
        settings["sequence"] = sequence
    return settings


def _routes(prefix: str, module: nn.Module, service: Service) -> Iterator[AttentionRoute]:
    """Routes of the outermost modules that an integration knows, with names in the whole model."""
    route = integration_for(module).attention(module, service, prefix)
    if route is not None and route.attends:
        yield route
        return
    for name, child in module.named_children():
        yield from _routes(f"{prefix}.{name}" if prefix else name, child, service)


fast_attention: FastAttentionTechnique = register(FastAttentionTechnique())
