"""`state_dict` and `load_state_dict` of a model whose weights are away.

Modules that own absent parameters get three hooks, and the model one that refuses to load in the middle of a step. When saving,
placeholders are replaced by tensors over the stored bytes: nothing is read before it is used, so saving a model that does not fit needs
no more memory than running it. When loading, a module's own values are made present just before torch copies into them and stored just
after; a user's file is never written, changed pieces move to ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn

from torchwrap.core import errors
from torchwrap.core.tensors import bind, data_of, set_holder
from torchwrap.stream.pieces import check_untouched

if TYPE_CHECKING:
    from torchwrap.stream.units import Piece
    from torchwrap.weights.handle import WeightsHandle

__all__ = ["hook_states", "unhook_states"]


class _StateHook:
    """Base of them all; found again by `unhook_states`, copied with the model by deepcopy."""

    def __init__(self, handle: WeightsHandle) -> None:
        self.handle = handle


class _Save(_StateHook):
    def __call__(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        self.handle.hide_lent()
        for name, piece in _absent(self.handle, module).items():
            saved = state.get(prefix + name)
            if saved is not None:
                engine = self.handle.engine
                check_untouched(piece) if engine is None else engine.check_away(piece)
                with self.handle.unchanging(piece):
                    view = self.handle.handed.give(self.handle, piece, state)
                # state_dict(keep_vars=True) hands out parameters; the model's own shows the placeholder.
                state[prefix + name] = nn.Parameter(view, piece.parameter.requires_grad) if isinstance(saved, nn.Parameter) else view


class _BeforeLoad(_StateHook):
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
        # assign=True would put other parameter objects in; copying keeps the objects that optimizers and ties refer to.
        local_metadata["assign_to_params_buffers"] = False
        for name, piece in _absent(self.handle, module).items():
            if prefix + name in state:
                # The old values, because a value of another shape is reported by torch and not copied.
                value = self.handle.value(piece)
                self.handle.lent[piece.index] = piece
                bind(piece.parameter, value)


class _NotWithinStep(_StateHook):
    """On the model itself, whose hook is the first to be called: nothing has been copied yet."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.handle.backward.settle()
        if self.handle.stepping:
            raise errors.ConflictError(
                "torchwrap: load_state_dict() of the model between backward() and step(): the step has updated some weights already, and "
                "would go on with others",
                where="load_state_dict",
                fix="Call optimizer.step() or rollback() first, or close() the optimizer and make a new one.",
            )


class _AfterLoad(_StateHook):
    def __call__(self, module: nn.Module, _: Any) -> None:
        # Only this module's own: torch calls this when the children are done, so an outer module's values are still on their way.
        lent = [piece for piece in _absent(self.handle, module).values() if piece.index in self.handle.lent]
        try:
            for piece in lent:
                self.handle.set_value(piece, data_of(piece.parameter))
        finally:
            for piece in lent:
                self.handle.lent.pop(piece.index, None)
                bind(piece.parameter, piece.absent)


def _absent(handle: WeightsHandle, module: nn.Module) -> dict[str, Piece]:
    """What a hooked module owns and is away, by name; also what a parametrization has taken over from it since."""
    found = dict(handle.absent(module))
    for name, owner in getattr(module, "parametrizations", {}).items():
        if "_torchwrap_holder" not in owner.__dict__:
            found |= {f"parametrizations.{name}.{each}": piece for each, piece in handle.absent(owner).items()}
    return found


def hook_states(model: nn.Module, handle: WeightsHandle) -> list[nn.Module]:
    """Put the hooks and the holder on every module that owns an absent parameter, and one hook on the model; the modules that own."""
    hooked = [module for module in model.modules() if handle.absent(module)]
    model.register_load_state_dict_pre_hook(_NotWithinStep(handle))
    for module in hooked:
        set_holder(module, handle)
        module.register_state_dict_post_hook(_Save(handle))
        module.register_load_state_dict_pre_hook(_BeforeLoad(handle))
        module.register_load_state_dict_post_hook(_AfterLoad(handle))
    return hooked


def unhook_states(modules: Iterable[nn.Module]) -> None:
    """Take them all off again; modules without any are left alone."""
    for module in modules:
        if "_torchwrap_holder" in module.__dict__:
            set_holder(module, None)
        for hooks in _hook_tables(module):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "hook", hook), _StateHook):
                    del hooks[key]


def _hook_tables(module: nn.Module) -> Iterator[MutableMapping[int, Any]]:
    yield module._state_dict_hooks
    yield module._load_state_dict_pre_hooks
    yield module._load_state_dict_post_hooks
