"""Python code in a fresh process, for what only shows there: unpickling, a machine without torchwrap, exit, import order."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

__all__ = ["fresh_process"]

ROOT = Path(__file__).parents[2]

_WITHOUT_TORCHWRAP = "import sys; sys.modules['torchwrap'] = None\n"
_PRELUDE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests import torchvision_ops
"""


def fresh_process(script: str, *, torchwrap: bool = True, timeout_s: float = 120.0) -> str:
    """Standard output of `script` in a new interpreter; with `torchwrap=False`, importing torchwrap fails there.

    Raises:
        AssertionError: the process ended with an error; its standard error is the message.
    """
    source = ("" if torchwrap else _WITHOUT_TORCHWRAP) + _PRELUDE.format(root=str(ROOT)) + textwrap.dedent(script)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
