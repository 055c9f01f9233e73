"""Applying and undoing techniques: all-or-nothing, in phase order, recorded on the model.

Every config is checked and planned before anything is touched; then techniques are attached from the outermost phase to the innermost,
and if one fails those before it are undone. The record is in the root module's `__dict__["_torchwrap_applied"]`, so it travels with
deepcopy and pickle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from torchwrap.core.config import Config
from torchwrap.core.decorate import drop_pending, undecorate_class
from torchwrap.core.errors import ConflictError, NotAppliedError, TorchwrapError, UnsupportedModelError
from torchwrap.core.integration import integration_for
from torchwrap.core.layer import Layer, suspended
from torchwrap.core.order import check_foreign, check_pair, foreign_mechanisms
from torchwrap.core.swap import attach, check_swappable, detach, layers_of, owners_of
from torchwrap.core.technique import Applied, Named, Place, Prepared, Technique, as_configs, name_of, technique_named

if TYPE_CHECKING:
    from torchwrap.core.plan import Plan

__all__ = [
    "applied",
    "apply",
    "disabled",
    "handle_of",
    "inner_model",
    "prepare_all",
    "records_of",
    "skipped_of",
    "unwrap",
    "wrappers_of",
]

M = TypeVar("M", bound=nn.Module)

_RECORD, _SKIPPED = "_torchwrap_applied", "_torchwrap_skipped"
_lock = threading.RLock()

# Wrappers of other libraries that hold the user's model in an attribute, by class name so that nothing is imported.
_OUTER = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}


def inner_model(model: nn.Module) -> nn.Module:
    """The user's model inside DDP, FSDP1, DataParallel and `torch.compile`; the model itself if it is none of these.

    Raises:
        UnsupportedModelError: it is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is no nn.Module", fix="Pass the model, such as pipe.unet of a pipeline.")
    for cls in type(model).__mro__:
        attribute = _OUTER.get(f"{cls.__module__}.{cls.__qualname__}")
        if attribute is not None:
            return inner_model(getattr(model, attribute))
    return model


def records_of(root: nn.Module) -> dict[str, Applied]:
    """What is recorded on this very module, in the order it was applied."""
    records: dict[str, Applied] = root.__dict__.get(_RECORD, {})
    return records


def skipped_of(root: nn.Module) -> dict[str, str]:
    """Techniques that `apply(strict=False)` left out, and why."""
    skipped: dict[str, str] = root.__dict__.get(_SKIPPED, {})
    return skipped


def prepare_all(
    root: nn.Module,
    configs: Sequence[Config],
    *,
    outer: nn.Module | None = None,
    on_error: Callable[[Config, TorchwrapError], None] | None = None,
) -> list[tuple[Technique[Any], Prepared[Any]]]:
    """Check configs against the model, each other and what is there, and plan them; touches nothing.

    Args:
        root: the model, looked through.
        configs: in the user's order.
        outer: what the user handed over, if that was a wrapper around `root`: it may be a foreign mechanism itself.
        on_error: takes the errors instead of the caller; the config concerned is left out.

    Returns:
        (technique, plan) pairs from the outermost phase to the innermost.
    """
    check_swappable(root)
    ordered = sorted(((technique_named(config.technique), config) for config in configs), key=lambda item: item[0].phase)
    present = _present(root)
    sightings = foreign_mechanisms(root if outer is None else outer)
    integration = integration_for(root)
    result: list[tuple[Technique[Any], Prepared[Any]]] = []
    for technique, config in ordered:
        try:
            _check_new(technique.name, config, present)
            notes = check_foreign(sightings, technique.name, technique.phase)
            prepared = technique.prepare(root, config, integration)
            _check_places(technique, prepared.layers, [entry for _, other in result for entry in other.layers])
        except TorchwrapError as error:
            if on_error is None:
                raise
            on_error(config, error)
            continue
        prepared.notes = [*notes, *prepared.notes]
        present[technique.name] = str(config)
        result.append((technique, prepared))
    return result


def _present(root: nn.Module) -> dict[str, str]:
    """Techniques that already reach into `root`: name -> where and how."""
    found: dict[str, str] = {}
    for fqn, module in root.named_modules():
        for layer in layers_of(module):
            found.setdefault(layer.name, f"applied to a module around {fqn or 'this one'}")
    for fqn, module in root.named_modules():
        for name, record in records_of(module).items():
            found[name] = _set_in(record.config) + (f" on {fqn}" if fqn else "")
    return found


def _set_in(config: Config) -> str:
    """The config without what is at its default."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if getattr(config, field.name) != field.default}
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _check_new(name: str, config: Config, present: dict[str, str]) -> None:
    if name in present:
        raise ConflictError(
            f"{name} is there already: {present[name]}; asked for now: {_set_in(config)}",
            fix=f"Undo the first one: torchwrap.unwrap(model, {name!r}).",
        )
    for other in present:
        check_pair(other, name, "model")


def _check_places(technique: Technique[Any], places: Sequence[Place], others: Sequence[Place]) -> None:
    planned: dict[int, list[Layer]] = {}
    for _, module, layer in others:
        planned.setdefault(id(module), []).append(layer)
    for fqn, module, layer in places:
        for other in (*layers_of(module), *planned.get(id(module), ())):
            check_pair(other.name, technique.name, "module", fqn)
            if other.replace is not None and layer.replace is not None:
                raise ConflictError(
                    f"{other.name} and {technique.name} both replace the code of one module", where=fqn,
                    fix=f"Remove one: torchwrap.unwrap(model, {other.name!r}), or leave {technique.name} out.",
                )


def apply(model: M, configs: Config | Sequence[Config] | Plan, *, strict: bool = True) -> M:
    """Apply techniques to a model and return it: all of them, or none.

    Args:
        model: the model, or its DDP, FSDP1, DataParallel or `torch.compile` wrapper.
        configs: a config, several (their order has no meaning), or a plan.
        strict: with False, a config the model is not fit for is left out, and `describe` says why.

    Raises:
        ConflictError: two techniques, or a technique and a foreign mechanism, exclude each other.
        UnsupportedModelError: the model lacks something a technique needs.
        TorchwrapError: whatever else a technique raises; the model is as it was.

    Example:
        >>> import torch, torchwrap as tw
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> tw.apply(model, [tw.Trace()]) is model
        True
        >>> list(tw.wrappers_of(model))
        ['trace']
    """
    root = inner_model(model)
    wanted = as_configs(configs)
    skipped: dict[str, str] = {}

    def skip(config: Config, error: TorchwrapError) -> None:
        if not isinstance(error, UnsupportedModelError):
            raise error
        skipped[config.technique] = str(error)

    done: list[str] = []
    with _lock, _Quiet(root) as quiet:
        prepared = prepare_all(root, wanted, outer=model, on_error=None if strict else skip)
        try:
            for technique, plan in prepared:
                _put_on(root, technique, plan, quiet)
                done.append(technique.name)
        except BaseException:
            for name in reversed(done):
                _take_off(root, name)
            raise
        if skipped:
            root.__dict__[_SKIPPED] = {**skipped_of(root), **skipped}
    return model


class _Quiet(ExitStack):
    """While it is open no forward runs on weights that the owners held so far place; each is held once."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.held: set[int] = set()
        self.hold(owner for module in root.modules() for owner in owners_of(module))

    def hold(self, owners: Iterable[Any]) -> None:
        for owner in owners:
            if id(owner) not in self.held and hasattr(owner, "call_lock"):
                self.enter_context(owner.call_lock())
                self.held.add(id(owner))


def _put_on(root: nn.Module, technique: Technique[Any], prepared: Prepared[Any], quiet: _Quiet) -> None:
    handle = technique.attach(root, prepared)
    done: list[Place] = []
    try:
        quiet.hold(layer.owner for _, _, layer in prepared.layers)
        _check_places(technique, prepared.layers, [])
        for place in prepared.layers:
            _, module, layer = place
            layer.name = layer.name or technique.name
            attach(module, layer, outermost_index=sum(_phase(other) <= technique.phase for other in layers_of(module)))
            done.append(place)
        record = Applied(config=prepared.config, handle=handle, places=list(prepared.layers), notes=prepared.notes)
        root.__dict__.setdefault(_RECORD, {})[technique.name] = record
    except BaseException:
        technique.detach(root, handle)
        for _, module, layer in reversed(done):
            detach(module, layer)
        raise


def _phase(layer: Layer) -> int:
    try:
        return technique_named(layer.name).phase
    except NotAppliedError:  # a layer that somebody attached by hand stands outside
        return -1


def _take_off(root: nn.Module, name: str) -> None:
    """Undo one technique of `root`; if its `detach` fails it is still applied.

    The technique goes first: another thread that waits for the lock then finds real weights, whether it meets a layer or not.
    """
    record = records_of(root)[name]
    technique_named(name).detach(root, record.handle)
    for _, module, layer in record.places:
        if any(layer is other for other in layers_of(module)):
            detach(module, layer)
    del root.__dict__[_RECORD][name]
    if not root.__dict__[_RECORD]:
        del root.__dict__[_RECORD]


@overload
def unwrap(model: type[M], name: Named | None = None) -> type[M]: ...
@overload
def unwrap(model: M, name: Named | None = None) -> M: ...
def unwrap(model: Any, name: Named | None = None) -> Any:
    """Undo one technique, or all, and return the model. Techniques may be undone in any order.

    Args:
        model: a model, its outer wrapper, or a decorated class (whose future instances are then plain).
        name: a technique's name, or the technique, its config class or a config; `None` undoes all, and nothing if none is applied.

    Raises:
        NotAppliedError: the technique is not applied; the message lists what is.
    """
    wanted = None if name is None else name_of(name)
    if isinstance(model, type):
        undecorate_class(model, wanted)
        return model
    root = inner_model(model)
    with _lock, _Quiet(root):
        if wanted is not None and wanted not in records_of(root) and wanted not in skipped_of(root):
            raise _not_applied(root, wanted)
        if wanted is None:
            drop_pending(root)
        for applied_name in [wanted] if wanted is not None else list(reversed(records_of(root))):
            if applied_name in records_of(root):
                _take_off(root, applied_name)
        rest = {key: reason for key, reason in skipped_of(root).items() if wanted is not None and key != wanted}
        if rest:
            root.__dict__[_SKIPPED] = rest
        else:
            root.__dict__.pop(_SKIPPED, None)
    return model


def _not_applied(root: nn.Module, name: str) -> NotAppliedError:
    below = [
        f"torchwrap.unwrap(model.{fqn}, {name!r})" for fqn, module in root.named_modules() if fqn and name in records_of(module)
    ]
    fix = f"It is applied to a part of this model: {below[0]}." if below else f"Applied: {', '.join(records_of(root)) or 'nothing'}."
    return NotAppliedError(f"{name} is not applied to this {type(root).__name__}", fix=fix)


@contextmanager
def applied(model: M, configs: Config | Sequence[Config] | Plan) -> Iterator[M]:
    """Techniques for the length of a `with` block, or of a function it decorates; undone on exit, also on error."""
    wanted = as_configs(configs)
    apply(model, wanted)
    try:
        yield model
    finally:
        for config in reversed(wanted):
            if config.technique in records_of(inner_model(model)):
                unwrap(model, config.technique)


def wrappers_of(model: nn.Module) -> dict[str, Config]:
    """Configs of what is applied to `model`, outermost technique first."""
    records = records_of(inner_model(model))
    names = sorted(records, key=lambda name: technique_named(name).phase)
    return {name: records[name].config for name in names}


def handle_of(model: nn.Module, name: Named) -> Any:
    """The live object of an applied technique (`stats()`, `predict()`, `explain()`, `trim()`).

    Raises:
        NotAppliedError: it is not applied; the message lists what is.
    """
    wanted = name_of(name)
    root = inner_model(model)
    if wanted not in records_of(root):
        raise _not_applied(root, wanted)
    return records_of(root)[wanted].handle


@contextmanager
def disabled(model: M, *names: Named) -> Iterator[M]:
    """The model's own behaviour in this thread for the length of the block; no weights move, and other threads see no change.

    Args:
        model: a model with techniques on it.
        *names: techniques to pass over, named as for `unwrap`; none means all. Layers that make weights present go on working.

    Raises:
        NotAppliedError: a name is not applied anywhere in the model.
    """
    root, wanted = inner_model(model), [name_of(name) for name in names]
    records = [(name, record) for module in root.modules() for name, record in records_of(module).items()]
    for name in wanted:
        if name not in {known for known, _ in records}:
            raise _not_applied(root, name)
    layers = tuple(layer for name, record in records if not wanted or name in wanted for _, _, layer in record.places)
    with suspended(layers):
        yield model
