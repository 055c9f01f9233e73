"""Training with weights and state far above the memory limit: it finishes, it is right, and peak and bytes are what was promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.cgroup import run_child
from benchmarks.harness.checkpoints import Shape, write_checkpoint
from tests.memory.conftest import CHILDREN, ENVIRONMENT, ROOT
from tests.sharing import made_once

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("limits")

MIB = 1 << 20
STEPS = 2
WINDOW_STEPS = 3  # the second is measured, before the third the window is chosen
# 82 M parameters in 10 blocks of 32 MB: 1.3 GB of weights, gradients and state.
SHAPE = Shape(
    name="llama-82M",
    hidden=768,
    mlp=2816,
    blocks=10,
    heads=12,
    kv_heads=4,
    vocabulary=2048,
    tied=True,
    shards=1,
    dtype="float32",
)
LIMIT = 640 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, SHAPE.name, lambda folder: write_checkpoint(SHAPE, folder))


@pytest.fixture(scope="module")
def losses(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of training without torchwrap and without a limit."""

    def said(into: Path) -> None:
        command = [sys.executable, str(CHILDREN), "train_plainly", str(folder), str(WINDOW_STEPS)]
        found = run_child(command, environment=ENVIRONMENT, folder=ROOT, timeout_s=120).check().data["losses"]
        (into / "losses.json").write_text(json.dumps(found))

    found: list[str] = json.loads((made_once(tmp_path_factory, "losses-in-memory", said) / "losses.json").read_text())
    return found


def test_training_above_the_limit_is_right_and_takes_what_was_promised(child: Any, folder: Path, losses: list[str]) -> None:
    result = child("train", folder, STEPS, "checkpointing", limit=LIMIT).check()
    assert result.data["losses"] == losses[:STEPS]
    assert result.data["streamed_bytes"] > 0
    assert result.peak_bytes < LIMIT < 4 * SHAPE.nbytes()
    for prediction in (result.data["promised"], result.data["measured"]):
        promised = prediction["peak_process"]
        assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (prediction, result.peak_bytes)
    assert result.data["promised"]["computing_s"] is None
    assert result.data["measured"]["computing_s"] > 0


def test_the_defaults_of_the_goal_train_stay_below_the_limit(child: Any, folder: Path, losses: list[str]) -> None:
    """Nobody asked for checkpointing: the first step is recomputed, and the second one chooses what there is room for."""
    result = child("train", folder, STEPS, limit=LIMIT).check()
    assert result.data["losses"] == losses[:STEPS]
    for prediction in (result.data["promised"], result.data["measured"]):
        promised = prediction["peak_process"]
        assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (prediction, result.peak_bytes)


def test_an_optimizer_that_cannot_fit_is_refused_and_the_model_goes_on(child: Any, folder: Path) -> None:
    data = child("refuse_optimizer", folder, limit=LIMIT).check().data
    assert 'goal="train"' in data["error"]
    assert data["promised"] > LIMIT
    assert data["needed"] < data["promised"]
    assert data["same"]
    assert data["left"] < MIB


def test_blocks_that_keep_their_activations_are_planned_as_such(child: Any, folder: Path, losses: list[str]) -> None:
    """More of the memory goes to activations; where that cannot be, it is refused before anything is taken."""
    result = child("train", folder, 1, "activations=keep", limit=LIMIT * 6 // 5).check()
    assert result.data["losses"] == losses[:1]
    promised = result.data["promised"]["peak_process"]
    assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (promised, result.peak_bytes)
    assert 'activations="auto"' in str(child("train", folder, 1, "activations=keep", limit=LIMIT * 5 // 8))


@pytest.mark.parametrize("train", [True, None], ids=["asked", "seen"])
def test_a_window_that_is_chosen_while_training_stays_below_the_limit(
    child: Any, folder: Path, losses: list[str], train: bool | None
) -> None:
    result = child("train_window", folder, WINDOW_STEPS, train, limit=LIMIT).check()
    assert result.data["losses"] == losses
    assert 1 <= max(result.data["ks"]) < SHAPE.blocks
    assert result.peak_bytes < LIMIT
    assert abs(result.data["predicted"] - result.peak_bytes) <= 0.10 * result.peak_bytes, (result.data, result.peak_bytes)
