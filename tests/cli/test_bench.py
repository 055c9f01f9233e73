"""bench runs contenders in processes of their own and compares what they computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children must run beside this environment's torchvision, as tests do."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'startup'}{os.pathsep}{ROOT}")


@pytest.mark.slow
def test_bench_compares_all_contenders(cli: Callable[..., Done], pristine: Path) -> None:
    pytest.importorskip("accelerate")
    done = cli(
        "bench", pristine, "--against", "accelerate,mmap,memory", "--device-memory", "2MiB",
        "--rounds", 1, "--prompt", 8, "--tokens", 2, "--json",
    )  # fmt: skip
    assert done.data["failures"] == {}
    assert done.status == 0
    assert set(done.data["contenders"]) == {"offload", "accelerate", "mmap", "memory"}
    assert done.data["same_tokens"]
    # The mapped file has the alignment that offload keeps; the others copy to aligned memory and may differ in the last bits.
    assert done.data["logits"]["mmap/offload"]["equal"]
    assert all(compared["largest_difference"] < 1e-4 for compared in done.data["logits"].values())
    assert set(done.data["ratios"]) == {"accelerate/offload", "mmap/offload", "memory/offload"}


@pytest.mark.slow
def test_bench_reports_a_contender_that_fails(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("bench", pristine, "--against", "mmap", "--device-memory", "1KiB", "--rounds", 1, "--prompt", 4, "--tokens", 1, "--json")
    assert done.status == 1
    assert "too small" in done.data["failures"]["offload"]
    assert "mmap" in done.data["contenders"]


def test_memory_limit_is_set_and_removed() -> None:
    from torchwrap.cli.limit import memory_group
    from torchwrap.core.errors import StorageError

    try:
        with memory_group(256 << 20) as group:
            assert group.path.is_dir()
            assert group.command(["true"])[-1] == "true"
            path = group.path
    except StorageError as error:
        pytest.skip(str(error))
    assert not path.exists()
