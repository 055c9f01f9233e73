"""Loaded by Python at start-up where this folder is on PYTHONPATH: command-line programs then run beside a torchvision that the CPU
build of torch cannot load, exactly as the tests do (see tests/torchvision_ops.py). Processes that do not look for torchvision, as the
helpers that multiprocessing starts, do not wait for torch.
"""

import sys
from typing import Any


class _BesideTorch:
    """Found first when torchvision is looked for, once."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(_BesideTorch)
            from tests import torchvision_ops

            torchvision_ops.ensure()


sys.meta_path.insert(0, _BesideTorch)
