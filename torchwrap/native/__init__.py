"""Kernels in C++ for what torch cannot express fast enough on a CPU; optional, built with the package where there is a compiler.

`available()` and `reason()` say whether they can be used; the callers choose, nothing here falls back silently. Each kernel is one
function with a torch reference of the same signature beside it.
"""

from torchwrap.native.decode import decode, decode_runs
from torchwrap.native.library import available, describe, instruction_sets, reason
from torchwrap.native.prefill import gradients, prefill
from torchwrap.native.reference import decode_reference, prefill_reference

__all__ = [
    "available",
    "decode",
    "decode_reference",
    "decode_runs",
    "describe",
    "gradients",
    "instruction_sets",
    "prefill",
    "prefill_reference",
    "reason",
]
