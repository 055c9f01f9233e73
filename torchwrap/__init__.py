"""Run and fine-tune the PyTorch models you have on hardware that is too small for them, with one line.

Every name below is loaded on first use. `torchwrap.offload`, `torchwrap.superpipeline`, `torchwrap.fast_attention` and `torchwrap.trace`
are techniques (call them), although packages of the same names exist; `torchwrap.core.Package` says how.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from torchwrap.core import BUILT_IN, callable_names

if TYPE_CHECKING:
    from torchwrap import core as core
    from torchwrap.core.config import Config as Config
    from torchwrap.core.errors import BudgetError as BudgetError
    from torchwrap.core.errors import ConfigError as ConfigError
    from torchwrap.core.errors import ConflictError as ConflictError
    from torchwrap.core.errors import CorruptDataError as CorruptDataError
    from torchwrap.core.errors import DiskFullError as DiskFullError
    from torchwrap.core.errors import NotAppliedError as NotAppliedError
    from torchwrap.core.errors import PlanError as PlanError
    from torchwrap.core.errors import StorageError as StorageError
    from torchwrap.core.errors import TorchwrapError as TorchwrapError
    from torchwrap.core.errors import TorchwrapWarning as TorchwrapWarning
    from torchwrap.core.errors import UnsafePathError as UnsafePathError
    from torchwrap.core.errors import UnsupportedModelError as UnsupportedModelError
    from torchwrap.core.plan import Plan as Plan
    from torchwrap.core.plan import plan_of as plan_of
    from torchwrap.core.report import Report as Report
    from torchwrap.core.report import check as check
    from torchwrap.core.report import describe as describe
    from torchwrap.core.technique import Handle as Handle
    from torchwrap.core.technique import Technique as Technique
    from torchwrap.core.transaction import applied as applied
    from torchwrap.core.transaction import apply as apply
    from torchwrap.core.transaction import disabled as disabled
    from torchwrap.core.transaction import handle_of as handle_of
    from torchwrap.core.transaction import unwrap as unwrap
    from torchwrap.core.transaction import wrappers_of as wrappers_of
    from torchwrap.fast_attention.config import FastAttention as FastAttention
    from torchwrap.fast_attention.technique import fast_attention as fast_attention
    from torchwrap.offload.config import Offload as Offload
    from torchwrap.offload.technique import offload as offload
    from torchwrap.optimizer.master import master_weights as master_weights
    from torchwrap.optimizer.optimizer import OffloadedOptimizer as OffloadedOptimizer
    from torchwrap.superpipeline.config import Superpipeline as Superpipeline
    from torchwrap.superpipeline.technique import superpipeline as superpipeline
    from torchwrap.trace.config import Trace as Trace
    from torchwrap.trace.technique import trace as trace

__version__ = "0.1.0"

_WHERE = {
    name: module
    for module, names in {
        "torchwrap.core.config": ("Config",),
        "torchwrap.core.errors": (
            "BudgetError", "ConfigError", "ConflictError", "CorruptDataError", "DiskFullError", "NotAppliedError", "PlanError",
            "StorageError", "TorchwrapError", "TorchwrapWarning", "UnsafePathError", "UnsupportedModelError",
        ),
        "torchwrap.core.plan": ("Plan", "plan_of"),
        "torchwrap.core.report": ("Report", "check", "describe"),
        "torchwrap.core.technique": ("Handle", "Technique"),
        "torchwrap.core.transaction": ("applied", "apply", "disabled", "handle_of", "unwrap", "wrappers_of"),
        "torchwrap.fast_attention.config": ("FastAttention",),
        # Not in __all__: these two need transformers.
        "torchwrap.integrations.transformers.callbacks": ("OffloadCallback", "PlanCallback"),
        "torchwrap.offload.config": ("Offload",),
        "torchwrap.optimizer.master": ("master_weights",),
        "torchwrap.optimizer.optimizer": ("OffloadedOptimizer",),
        "torchwrap.superpipeline.config": ("Superpipeline",),
        "torchwrap.trace.config": ("Trace",),
    }.items()
    for name in names
}

__all__ = [
    "BudgetError", "Config", "ConfigError", "ConflictError", "CorruptDataError", "DiskFullError", "FastAttention", "Handle",
    "NotAppliedError", "Offload", "OffloadedOptimizer", "Plan", "PlanError", "Report", "StorageError", "Superpipeline", "Technique",
    "TorchwrapError", "TorchwrapWarning", "Trace", "UnsafePathError", "UnsupportedModelError", "__version__", "applied", "apply",
    "check", "core", "describe", "disabled", "fast_attention", "handle_of", "master_weights", "offload", "plan_of", "superpipeline",
    "trace", "unwrap", "wrappers_of",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        value: object = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in ("core", "integrations", "storage", "stream", "attention", "cli", "demo"):
        return importlib.import_module(f"torchwrap.{name}")
    raise AttributeError(f"module 'torchwrap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = callable_names(**BUILT_IN)
