"""Is transformers building a model right now, and where did a model come from.

`from_pretrained` and `from_config` construct modules (the former on `meta`, with no weight in sight) and fill them afterwards. Whatever
reacts to the construction of a decorated class has to wait until the loader has returned. The loader tells nobody that it runs, so the
callers' frames are looked at: a frame that executes the code of one of its entry points is the loader.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn

from torchwrap.core.integration import LoadingState

__all__ = ["loading_state", "source"]

# Methods of PreTrainedModel in which every loader ends, Auto classes included (transformers 5.23) -> name for messages.
ENTRY_POINTS = {"from_pretrained": "from_pretrained", "_from_config": "from_config"}


def loading_state() -> LoadingState:
    """Whether a transformers loader is among the callers in this thread; the outermost one gives the name.

    Cost: a walk over the stack; nothing is imported.
    """
    codes = _entry_codes()
    found = ""
    frame: FrameType | None = sys._getframe(1) if codes else None
    while frame is not None:
        found = codes.get(frame.f_code, found)
        frame = frame.f_back
    return LoadingState(active=bool(found), loader=found)


def source(model: nn.Module) -> Path | None:
    """The local folder the model was loaded from, or None if it is not known or no longer there."""
    config = getattr(model, "config", None)
    for holder, attribute in ((config, "_name_or_path"), (config, "name_or_path"), (model, "name_or_path")):
        name = getattr(holder, attribute, None)
        if isinstance(name, str) and name and Path(name).is_dir():
            return Path(name).resolve()
    return None


def _entry_codes() -> dict[CodeType, str]:
    modeling = sys.modules.get("transformers.modeling_utils")
    base: Any = getattr(modeling, "PreTrainedModel", None)
    found = ((getattr(base, method, None), name) for method, name in ENTRY_POINTS.items())
    return {_code(function): name for function, name in found if function is not None}


def _code(function: Any) -> CodeType:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code: CodeType = getattr(function, "__func__", function).__code__
    return code
