"""What every test of the project runs under: this checkout first on the path, offline, one thread, seeded, no time limits in hypothesis."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Another distribution ships a package called `tests`; ours has to win, here and in the processes that tests start.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a developer has measured of attention on this machine must not choose the back ends of the tests.
os.environ.setdefault("TORCHWRAP_CACHE", str(Path(tempfile.gettempdir()) / f"torchwrap-tests-{os.getuid()}"))

import torch
from hypothesis import HealthCheck, settings

from tests import torchvision_ops

torchvision_ops.ensure()
torch.set_num_threads(1)  # xdist runs one process per core; results of small models do not depend on it

settings.register_profile("ci", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    # Without a device, `torch.manual_seed` formats and keeps the stack of each call for the day there is one.
    (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(0)
    yield


_file = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the first test of each file, what is alive leaves the sight of the collector.

    That is the frameworks and 17,000 tests: looking through them takes a quarter of a second, for which hundreds of tests pay once or more.
    What is garbage by then is collected first; what a test makes is not frozen while it runs.
    """
    if item.session.stash.get(_file, None) != item.path:
        item.session.stash[_file] = item.path
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions complain at exit of objects that nobody collected
