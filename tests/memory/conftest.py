"""Memory tests run a child in a memory control group; where that is impossible they skip and say why."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.cgroup import ChildResult, run_child, unavailable_reason
from benchmarks.harness.checkpoints import SHAPES, write_checkpoint
from tests.sharing import made_once

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = Path(__file__).with_name("children.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # other workers take the other cores, and threads that wait for each other take time from them
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}

RunChild = Callable[..., ChildResult]


@pytest.fixture
def child() -> RunChild:
    """`child("name", argument, ..., limit=bytes)` runs that function of children.py in a fresh process and returns its result."""

    def run(name: str, *arguments: Any, limit: int | None = None) -> ChildResult:
        command = [sys.executable, str(CHILDREN), name, *map(str, arguments)]
        return run_child(command, limit=limit, environment=ENVIRONMENT, folder=ROOT, timeout_s=240)

    return run


@pytest.fixture(scope="session")
def reference_tokens(large_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Tokens that the checkpoint generates without torchwrap and without a limit, a 32-token prompt and three new ones."""

    def said(folder: Path) -> None:
        command = [sys.executable, str(CHILDREN), "plain", str(large_checkpoint), "3"]
        found = run_child(command, environment=ENVIRONMENT, folder=ROOT, timeout_s=120).check().data["ids"]
        (folder / "ids.json").write_text(json.dumps(found))

    found: list[int] = json.loads((made_once(tmp_path_factory, "reference-tokens", said) / "ids.json").read_text())
    return found


@pytest.fixture(scope="session")
def limits() -> None:
    """Skip where no memory limit can be set."""
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 0.9 GB on disk; the tests run it in much less memory."""
    return made_once(tmp_path_factory, "llama-0.9GB", lambda folder: write_checkpoint(SHAPES["llama-0.9GB"], folder))
