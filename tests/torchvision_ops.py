"""Lets torchvision import beside a torch build that its compiled operators were not made for.

torchvision 0.28 from the package index carries operators for the CUDA build of torch. Beside the CPU build its library does not
load, the operator `torchvision::nms` is missing, and `import torchvision` raises while it registers a fake implementation for it;
`import transformers` then fails for every model that looks for torchvision. Declaring the two schemas is enough for classifiers,
timm and transformers, which never call them. The library itself needs none of this: it is a matter of the test environment, loaded
by the root `conftest.py` and by every test that starts a fresh process. So that nothing else meets it, the Makefile installs torchvision
and timm into a folder beside the environment's own packages, which is put on the path here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["ensure"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library takes its operators back when it is collected


def ensure() -> bool:
    """Declare the two operators where torchvision's own library cannot; True when they were declared here."""
    beside = Path(sys.prefix, "vision")
    if beside.is_dir() and str(beside) not in sys.path:
        sys.path.append(str(beside))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _declared:
        return bool(_declared)
    if _own_operators_load(Path(next(iter(spec.submodule_search_locations)))):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
    return True


def _own_operators_load(folder: Path) -> bool:
    for binary in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            continue
        return True
    return False


ensure()
