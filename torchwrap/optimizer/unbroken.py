"""A call that an interrupt of the caller does not cut short.

Python raises Ctrl-C, and whatever other signals raise, in the main thread between any two lines. A step of an optimizer that is cut there
has updated some weights, and nobody knows which. So it runs in a thread of its own; the interrupt ends the waiting only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

__all__ = ["Unbroken"]


class Unbroken:
    """One call of `fn`, which begins with the first `wait`.

    Args:
        fn: is called once, in another thread, with gradients enabled, a stream of the device, and torch's kernels shared among threads as
            where this is made.
    """

    def __init__(self, fn: Callable[[], None]) -> None:
        self._fn, self._threads, self._grad = fn, torch.get_num_threads(), torch.is_grad_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._claim = threading.Lock()
        self._over = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when the call is over; after an interrupt this may be called again, and waits for the same call.

        Raises:
            BaseException: what the call raised.
        """
        if not self._over.is_set():
            # An interrupt may have come before the thread of an earlier call began, or after: only one of them gets the claim.
            thread = threading.Thread(target=self._run, name="torchwrap-step", daemon=True)
            thread.start()
            thread.join()
            self._over.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            if torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            with torch.set_grad_enabled(self._grad), torch.cuda.stream(self._stream):
                self._fn()
        except BaseException as error:  # raised to who waits
            self._error = error
        finally:
            self._over.set()
