"""Interrupts (Ctrl-C) at chosen places: Python raises them in the main thread where a function begins or has called something."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torchwrap

__all__ = ["interrupted"]

_ROOT = str(Path(torchwrap.__file__).parent) + "/"


def interrupted(call: Callable[[], Any], file: str, function: str, number: int = 0) -> bool:
    """Make the call, and interrupt it where Python could for the `number`th time inside a function; whether it came so far.

    Args:
        file: of torchwrap.
        function: its name, of a method without its class.
    """
    seen = 0

    def watch(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_name != function or frame.f_code.co_filename != _ROOT + file or seen > number:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    def step(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen
        if event == "opcode" and frame.f_lasti in _places(frame.f_code):
            seen += 1
            if seen == number + 1:
                raise KeyboardInterrupt
        return step

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@functools.cache
def _places(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which Python looks for signals (CPython 3.11 and later)."""
    steps = list(dis.get_instructions(code))
    after = {later.offset for step, later in pairwise(steps) if step.opname in ("RESUME", "CALL", "CALL_FUNCTION_EX")}
    return frozenset(after | {step.argval for step in steps if "JUMP_BACKWARD" in step.opname})
