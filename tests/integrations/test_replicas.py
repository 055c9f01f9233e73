"""Two real processes over gloo: replicas of an offloaded model compute what they compute in memory, or are refused with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations.replicas import REFUSED, WORKING
from tests.sharing import made_once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes says of every way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.replicas"]

    def make(folder: Path) -> None:
        done = subprocess.run([*command, str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]

    folder = made_once(tmp_path_factory, "replicas", make)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WORKING)
def test_replicas_compute_what_they_compute_in_memory(way: str, told: list[dict[str, Any]]) -> None:
    assert [each["processes"] for each in told] == [2, 2]
    assert told[0]["losses"] != told[1]["losses"]  # each process has seen its own data
    assert [each[way] for each in told] == [[True, True], [True, True]]


@pytest.mark.parametrize("way", [name for name in REFUSED if name != "trainer"])
def test_copying_weights_that_are_away_is_refused(way: str, told: list[dict[str, Any]]) -> None:
    technique = "superpipeline" if way == "superpipeline" else "offload"
    for each in told:
        error, message = each[way]
        assert error == "ConflictError"
        assert f"{technique}: DistributedDataParallel would copy the weights of process 0 over those of the others" in message
        assert f"DistributedDataParallel(model) first, then torchwrap.{technique}(model), then the optimizer" in message
        assert "init_sync=False" in message


def test_the_callback_refuses_when_the_trainer_is_made(told: list[dict[str, Any]]) -> None:
    for each in told:
        error, message = each["trainer"]
        assert error == "UnsupportedModelError"
        assert "the trainer would make 2 replicas of the model" in message and "accelerator.prepare(model)" in message
