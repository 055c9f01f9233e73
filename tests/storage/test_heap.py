"""Memory of freed tensors is used again up to a bound, by whichever thread or child, and undone without a trace."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from torchwrap.storage.heap import FreedBlocks, keep_heap_small, refusal

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GRAIN = 64 << 10
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())


@pytest.fixture
def freed() -> Iterator[FreedBlocks]:
    gc.unfreeze()  # conftest.py: what was there before this file is seen again
    for left in [found for found in gc.get_objects() if type(found) is FreedBlocks]:
        left.close()  # of optimizers that other tests left open: bounds add up
    gc.freeze()  # garbage of other tests does not go, and its memory is not kept, in the middle of this one
    keep_heap_small()
    opened = FreedBlocks(8 * MIB)
    assert opened.nbytes == 8 * MIB, opened.reason
    yield opened
    opened.close()
    gc.unfreeze()


def in_a_child(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    imports = "import torch\nfrom torchwrap.storage.heap import *\n"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", imports + code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("nbytes", [256 << 10, MIB, MIB + 1, 3 * MIB - 7], ids=["least", "whole", "one more", "odd"])
def test_memory_of_a_freed_tensor_serves_the_next_of_its_size(freed: FreedBlocks, nbytes: int) -> None:
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    address = tensor.data_ptr()
    del tensor
    again = torch.empty(nbytes, dtype=torch.uint8)
    assert again.data_ptr() == address
    assert address % 64 == 0


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system has no transparent huge pages")
def test_blocks_that_may_be_kept_lie_in_huge_pages_and_others_do_not() -> None:
    # In a fresh process: in this one, numpy may have marked memory of the heap that a tensor is given now.
    code = f"""
import re
from pathlib import Path

def flags(tensor):  # of the mapping in which the tensor's middle lies
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= middle < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no mapping holds the tensor")

keep_heap_small()
freed = FreedBlocks({8 * MIB})
print("hg" in flags(torch.ones({8 * MIB - GRAIN}, dtype=torch.uint8)))
print("hg" in flags(torch.ones({9 * MIB}, dtype=torch.uint8)))
freed.close()
print("hg" in flags(torch.ones({8 * MIB - GRAIN}, dtype=torch.uint8)))
"""
    assert in_a_child(code).split() == ["True", "False", "False"]


def test_other_sizes_and_small_tensors_are_left_to_the_c_library(freed: FreedBlocks) -> None:
    before = freed.counts()
    large, small = torch.empty(MIB, dtype=torch.uint8), torch.empty((256 << 10) - 1, dtype=torch.uint8)
    address = large.data_ptr()
    del large, small
    other = torch.empty(MIB + GRAIN, dtype=torch.uint8)
    assert other.data_ptr() != address
    assert freed.counts()["reused"] == before["reused"]
    assert freed.counts()["fresh"] == before["fresh"] + 2  # the small one is not counted


def test_no_more_than_the_bound_is_kept_and_the_oldest_goes_first(freed: FreedBlocks) -> None:
    tensors = [torch.empty(3 * MIB, dtype=torch.uint8) for _ in range(4)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for _ in range(4):
        del tensors[0]
        assert freed.counts()["bytes"] <= 8 * MIB
    # Two of 3 MiB fit; the last freed is the first used again, and then there is none.
    assert [torch.empty(3 * MIB, dtype=torch.uint8).data_ptr() for _ in range(1)] == addresses[3:]
    held = [torch.empty(3 * MIB, dtype=torch.uint8) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in held} == set(addresses[2:])
    huge = torch.empty(9 * MIB, dtype=torch.uint8)
    del huge
    assert freed.counts()["bytes"] == 0


def test_bounds_of_several_add_up_and_close_takes_one_back(freed: FreedBlocks) -> None:
    other = FreedBlocks(8 * MIB)
    kept = [torch.empty(5 * MIB, dtype=torch.uint8) for _ in range(3)]
    kept.clear()
    assert freed.counts()["bytes"] == 15 * MIB
    other.close()
    other.close()
    assert freed.counts()["bytes"] == 5 * MIB
    assert (other.nbytes, freed.nbytes) == (0, 8 * MIB)


def test_values_survive_threads_that_take_and_free(freed: FreedBlocks) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        generator = numpy.random.default_rng(number)
        for turn in range(200):
            sizes = generator.integers(4, 24, 2) * GRAIN
            pair = [torch.full((int(size) // 8,), number * 1000 + turn, dtype=torch.int64) for size in sizes]
            time.sleep(0)
            wrong.extend(turn for tensor in pair if not bool((tensor == number * 1000 + turn).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    before = freed.counts()["reused"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert freed.counts()["reused"] > before
    assert freed.counts()["bytes"] <= 8 * MIB


def test_forked_child_takes_and_frees_while_the_parent_does(freed: FreedBlocks) -> None:
    kept, over = torch.full((MIB,), 5, dtype=torch.uint8), threading.Event()

    def busy() -> None:
        while not over.is_set():
            torch.empty(2 * MIB, dtype=torch.uint8)

    thread = threading.Thread(target=busy)
    thread.start()
    statuses = []
    for _ in range(20):
        child = os.fork()
        if not child:
            mine = torch.full((MIB,), 7, dtype=torch.uint8)
            right = int(mine.sum()) == 7 * MIB and int(kept.sum()) == 5 * MIB
            del mine, kept
            freed.close()
            own = FreedBlocks(MIB)
            os._exit(0 if right and not own.reason else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    over.set()
    thread.join()
    assert statuses == [0] * 20
    assert int(kept.sum()) == 5 * MIB


def test_fork_leaves_no_kept_pages_in_the_child(freed: FreedBlocks) -> None:
    torch.ones(MIB)
    before = freed.counts()["bytes"]
    child = os.fork()
    if not child:
        os._exit(0 if freed.counts()["bytes"] == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (before, freed.counts()["bytes"]) == (4 * MIB, 0)
    torch.ones(MIB)
    assert freed.counts()["bytes"] == 4 * MIB


def test_storages_that_change_and_memory_of_others_are_untouched(freed: FreedBlocks) -> None:
    tensor = torch.arange(MIB // 8)
    tensor.untyped_storage().resize_(4 * MIB)
    assert torch.equal(tensor, torch.arange(MIB // 8))
    tensor.set_(torch.ones(MIB).untyped_storage(), 0, (MIB // 8,))  # type: ignore[call-overload]
    array = numpy.ones(MIB, dtype=numpy.uint8)
    shown = torch.from_numpy(array)
    before = freed.counts()["bytes"]
    del shown
    assert freed.counts()["bytes"] == before
    assert array.sum() == MIB
    shared = torch.ones(MIB, dtype=torch.uint8).share_memory_()
    assert int(shared.sum()) == MIB


def test_tensors_may_be_older_and_outlive_it_and_nothing_is_left() -> None:
    found = in_a_child(
        """
import resource
keep_heap_small()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
older, plain = torch.ones(1 << 20), faults()
freed = FreedBlocks(32 << 20)
younger, less = torch.ones(1 << 20), faults()
del older
assert freed.counts()["bytes"] == 8 << 20, freed.counts()  # of faults(), and the older
freed.close()
assert freed.counts()["bytes"] == 0
after, reused = faults(), freed.counts()["reused"]
del younger
assert freed.counts() == {"bytes": 0, "reused": reused, "fresh": freed.counts()["fresh"]}
left = FreedBlocks(32 << 20)  # still open when the interpreter ends
torch.ones(1 << 20)
print(plain, less, after)
"""
    )
    plain, less, after = map(int, found.split())
    assert less < plain / 4, "pages of freed tensors were not used again"
    assert after > plain / 2, "closing left it in place"


@pytest.mark.parametrize("variable", ["MALLOC_MMAP_THRESHOLD_=1000000", "GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1000000"])
def test_threshold_of_the_user_is_respected(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable.split("=", 1))
    freed = FreedBlocks(MIB)
    assert freed.nbytes == 0
    assert "environment" in freed.reason
    freed.close()


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_tool_that_watches_allocations_is_left_alone(tmp_path: Path) -> None:
    source, library = tmp_path / "watch.c", tmp_path / "watch.so"
    source.write_text("#include <stdlib.h>\nvoid __libc_free(void *);\nvoid free(void *at) { __libc_free(at); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert "tool that watches" in in_a_child("freed = FreedBlocks(1 << 20)\nprint(freed.reason, freed.nbytes)", LD_PRELOAD=str(library))


def test_profiler_sees_every_tensor(freed: FreedBlocks) -> None:
    def peak() -> list[int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            for _ in range(3):
                torch.empty(2 * MIB, dtype=torch.uint8)
        return [event.self_cpu_memory_usage for event in seen.key_averages() if event.key == "aten::empty"]

    assert peak() == [6 * MIB]


def test_less_is_kept_while_memory_is_in_use_elsewhere(freed: FreedBlocks) -> None:
    before = FreedBlocks.counts()["bytes"]
    tensors = [torch.empty(3 * MIB, dtype=torch.uint8) for _ in range(2)]
    tensors.clear()
    assert FreedBlocks.counts()["bytes"] == before + 6 * MIB
    freed.lend(4 * MIB)
    assert FreedBlocks.counts()["bytes"] == before + 3 * MIB  # the oldest went
    freed.lend(8 * MIB)  # more than there is
    assert FreedBlocks.counts()["bytes"] == before
    tensor = torch.empty(3 * MIB, dtype=torch.uint8)
    del tensor
    assert FreedBlocks.counts()["bytes"] == before
    freed.lend(-12 * MIB)
    tensor = torch.empty(3 * MIB, dtype=torch.uint8)
    del tensor
    assert FreedBlocks.counts()["bytes"] == before + 3 * MIB
    freed.lend(8 * MIB)
    freed.close()
    freed.lend(-8 * MIB)
    assert FreedBlocks.counts()["bytes"] == before
