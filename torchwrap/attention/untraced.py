"""Calls of Python that Dynamo leaves as they are: a graph ends before them, and the next one takes what they return as inputs.

To be imported where such a call is made and Dynamo is at work: importing it costs seconds that an eager program must not pay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__all__ = ["end_graph", "untraced"]

_WHAT_TO_DO = (
    "no part of a graph: leave fullgraph=True out, or make masks before the compiled function, and take its gradients outside of it, by "
    "torch.autograd.grad or backward, not by torch.func"
)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; neither it nor what it calls is traced."""
    return function(*args, **kwargs)


try:
    untraced: Callable[..., Any] = torch.compiler.disable(_call, reason=_WHAT_TO_DO)
except ImportError:  # where Dynamo cannot be imported, nothing is traced
    untraced = _call


def end_graph() -> NoReturn:
    """For what Dynamo calls with tensors without numbers, to have it called again with real ones, outside of any graph.

    Raises:
        Unsupported: Dynamo takes it for the end of the graph.
    """
    from torch._dynamo.exc import Unsupported  # there where Dynamo is at work

    raise Unsupported(_WHAT_TO_DO)
