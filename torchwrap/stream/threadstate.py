"""What a thread has of its own in torch and here, taken over by another thread that works for it.

Grad mode, inference mode, autocast, the default device, hooks on saved tensors, the number of compute threads, the current device and
stream, layers passed over by `disabled`, and context variables. A dispatch mode or a transform of torch.func sees the operators of one
thread in one order; those are refused.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from torchwrap.core import errors
from torchwrap.core.layer import held_back, suspended

__all__ = ["ThreadState"]

T = TypeVar("T")


class ThreadState:
    """The state of the thread that makes this object.

    Args:
        what: begins the message of a refusal.

    Raises:
        ConflictError: a dispatch mode or a torch.func transform is active.
    """

    def __init__(self, what: str) -> None:
        if _get_current_dispatch_mode_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            raise errors.ConflictError(
                f"{what}: a dispatch mode or a transform of torch.func is active, and sees the operators of this thread only",
                fix="Leave it, or make the calls one after another.",
            )
        self._context = contextvars.copy_context()
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self._caches_casts = torch.is_autocast_cache_enabled()
        self._modes: list[Any] = [
            torch.device(mode.device) if isinstance(mode, DeviceContext) else mode for mode in _get_current_function_mode_stack()
        ]
        self._saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._threads = torch.get_num_threads()
        self._held_back = held_back()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def run(self, function: Callable[[], T]) -> T:
        """What the function returns, called in this thread as if in that one."""
        return self._context.copy().run(self._run, function)

    def _run(self, function: Callable[[], T]) -> T:
        with ExitStack() as stack:
            stack.callback(self._leave_autocast)
            torch.autocast_increment_nesting()
            for kind, enabled, dtype in self._autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(self._caches_casts)
            if torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            if self._saving is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self._saving))
            if self._held_back:
                stack.enter_context(suspended(self._held_back))
            for mode in self._modes:
                stack.enter_context(mode)
            return function()

    def _leave_autocast(self) -> None:
        # Not torch.autocast: its end empties the cache of casts, which all threads share and which lasts as long as the caller's region.
        torch.autocast_decrement_nesting()
        for kind, _, _ in self._autocast:
            torch.set_autocast_enabled(kind, False)
