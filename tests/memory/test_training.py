"""Training with weights and state far above the memory limit: it finishes, it is right, and peak and bytes are what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.checkpoints import Shape, write_checkpoint

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("limits")

MIB = 1 << 20
STEPS = 2
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
    target = tmp_path_factory.mktemp("training") / SHAPE.name
    write_checkpoint(SHAPE, target)
    return target


def test_training_above_the_limit_is_right_and_takes_what_was_promised(child: Any, folder: Path) -> None:
    expected = child("train_plainly", folder, STEPS).check().data["losses"]
    result = child("train", folder, STEPS, limit=LIMIT).check()
    assert result.data["losses"] == expected
    assert result.data["streamed_bytes"] > 0
    assert result.peak_bytes < LIMIT < 4 * SHAPE.nbytes()
    for prediction in (result.data["promised"], result.data["measured"]):
        promised = prediction["peak_process"]
        assert abs(promised - result.peak_bytes) <= 0.10 * result.peak_bytes, (prediction, result.peak_bytes)
    assert result.data["promised"]["computing_s"] is None
    assert result.data["measured"]["computing_s"] > 0
