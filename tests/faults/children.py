"""Actions in a forked child, for what would end, limit or lock up the test process itself."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

__all__ = ["DEADLINE_S", "in_child"]

DEADLINE_S = 20


def in_child(action: Callable[[], Any]) -> Any:
    """What the action gives in a forked child; an exception if it raised one, the number of the signal (negative) if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(DEADLINE_S)  # a deadlock ends the child
        os.close(reading)
        try:
            result: Any = action()
        except BaseException as error:
            result = error
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else pickle.loads(content)
