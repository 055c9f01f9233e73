"""The public types, judged by the two checkers people use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNIPPETS = Path(__file__).with_name("snippets.py")

CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir={cache}", str(SNIPPETS)],
    "basedpyright": [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", sys.executable, str(SNIPPETS)],
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_public_calls_keep_the_type_of_the_model(checker: str, tmp_path: Path) -> None:
    pytest.importorskip(checker)
    command = [part.format(cache=tmp_path) for part in CHECKERS[checker]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
