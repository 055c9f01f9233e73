"""The public types, judged by the two checkers people use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNIPPETS = Path(__file__).with_name("snippets.py")

# mypy keeps what it knows of torch in the checkout, where `make check` may have left it: 1 second instead of 15.
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict", str(SNIPPETS)],
    "basedpyright": [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable, str(SNIPPETS)],
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_public_calls_keep_the_type_of_the_model(checker: str) -> None:
    pytest.importorskip(checker)
    done = subprocess.run(CHECKERS[checker], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
