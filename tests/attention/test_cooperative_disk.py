"""The oldest tokens on a disk: exact, in time as planned, consistent after every failure, and gone afterwards."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.cooperative_cases import DV, HKV, RATES, D, error, life, machines, make, queries, tokens, whole
from tests.attention.virtual import VirtualMachine
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.disk import Disk
from torchwrap.attention.cooperative.heads import HeadRoom
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.measure import measure_disk
from torchwrap.attention.cooperative.planner import CacheShape, Rates, plan_cache
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors
from torchwrap.storage.backend import Backend

ROOM = Room(device=10, recent=6, spill=2, host=16, block=8)
BY_HEAD = HeadRoom(1, Room(1 << 40, 0, host_allowed=False), Room(0, 0, 1, 16, True, 8))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Faulty(Backend):
    """A disk that fails when it is told to."""

    writing: OSError | None = None
    reading: OSError | None = None
    spoils = False

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        if self.writing is not None:
            raise self.writing
        return super().pwrite(fd, source, offset)

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        if self.reading is not None:
            raise self.reading
        count = super().pread(fd, target, offset)
        if self.spoils and count:
            target[0] ^= 1
        return count


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize("room", [ROOM, BY_HEAD], ids=["token", "head"])
@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_three_tiers_give_what_one_memory_gives(tmp_path: Path, machine: Any, room: Any, storage: torch.dtype | None) -> None:
    keys, values = (one.bfloat16().float() for one in tokens(130))  # which half storage holds exactly
    cache = make(room, machine(), workers=2, streamed=0.3, disk=Disk(tmp_path), storage=storage)
    cache.layers[0].reserve(2, HKV, D, DV, torch.float32, whole=False)
    for first, end in ((0, 3), (3, 40), (40, 41), (41, 90), (90, 130)):
        cache.append(0, keys[:, :, first:end], values[:, :, first:end])
    assert cache.layers[0].disk_tokens > 60 and cache.layers[0].host_tokens <= 16
    asked = {1: None, 3: TileMask.causal(1, 3, 130), 40: TileMask.causal(1, 40, 130), 2: TileMask.padded([130, 9], 2, 130)}
    for count, mask in asked.items():
        q = queries(count).bfloat16().float()
        assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6
    if isinstance(room, Room):
        with pytest.warns(errors.TorchwrapWarning, match="gathers"):
            assert torch.equal(TieredTensor(cache, 0, "keys").gathered(), keys)
    cache.release()
    assert list(tmp_path.iterdir()) == []


def test_a_random_life_stays_exact(tmp_path: Path) -> None:
    chance = random.Random(5)
    for _ in range(4):
        cache = make(ROOM, VirtualMachine(RATES), workers=1, disk=Disk(tmp_path))
        cache.layers[0].reserve(2, HKV, D, DV, torch.float32, whole=False)
        for keys, values in life(cache, chance, 16, longest=60, kept=1 / 3):
            count = chance.choice([1, min(40, keys.shape[2])])
            q, mask = queries(count, keys.shape[0]), TileMask.causal(1, count, keys.shape[2])
            assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6
        cache.release()


def test_a_window_reads_no_more_than_it_sees(tmp_path: Path) -> None:
    cache = make(ROOM, OneMemory(), disk=Disk(tmp_path))
    cache.layers[0].reserve(2, HKV, D, DV, torch.float32, whole=False)
    cache.append(0, *tokens(130))
    assert cache.disk is not None
    cache.attend(0, queries(1), mask=TileMask.window(1, 1, 130, 20))
    assert cache.disk._reader.stats.bytes == 0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param({"writing": OSError(errno.ENOSPC, "full")}, errors.DiskFullError, id="full"),
        pytest.param({"writing": OSError(errno.EIO, "broken")}, errors.StorageError, id="cannot be written"),
    ],
)
def test_a_disk_that_takes_no_more_costs_one_pass(tmp_path: Path, fault: dict[str, Any], kind: type[errors.StorageError]) -> None:
    backend = Faulty()
    cache = make(ROOM, OneMemory(), layers=2, disk=Disk(tmp_path, backend=backend))
    keys, values = tokens(40)
    for index in range(2):
        cache.layers[index].reserve(2, HKV, D, DV, torch.float32, whole=False)
        cache.append(index, keys, values)
    new = tokens(30)
    cache.append(0, *new)
    backend.__dict__.update(fault)
    with pytest.raises(kind) as raised:
        cache.append(1, *new)
    assert "layer 1; the cache holds the 40 tokens before" in str(raised.value.__notes__)
    assert [layer.length for layer in cache.layers] == [40, 40]
    backend.__dict__.clear()
    q = queries(1)
    for index in range(2):
        assert error(cache.attend(index, q), whole(q, keys, values)) < 1e-6
        cache.append(index, *new)
        assert error(cache.attend(index, q), whole(q, *(torch.cat(pair, 2) for pair in zip((keys, values), new, strict=True)))) < 1e-6


@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "prompt"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param({"reading": OSError(errno.EIO, "broken")}, errors.StorageError, id="cannot be read"),
        pytest.param({"spoils": True}, errors.CorruptDataError, id="other bytes"),
    ],
)
def test_a_disk_that_cannot_be_read_costs_one_pass(
    tmp_path: Path, fault: dict[str, Any], kind: type[errors.StorageError], rows: int
) -> None:
    backend = Faulty()
    cache = make(ROOM, OneMemory(), workers=2, disk=Disk(tmp_path, backend=backend))
    keys, values = tokens(130)
    cache.layers[0].reserve(2, HKV, D, DV, torch.float32, whole=False)
    cache.append(0, keys[:, :, : 130 - rows], values[:, :, : 130 - rows])
    cache.append(0, keys[:, :, 130 - rows :], values[:, :, 130 - rows :])
    backend.__dict__.update(fault)
    q = queries(rows)
    mask = TileMask.causal(1, rows, 130)
    with pytest.raises(kind) as raised:
        cache.attend(0, q, mask=mask)
    assert f"holds the {130 - rows} tokens before" in str(raised.value.__notes__)
    assert cache.layers[0].length == 130 - rows
    backend.__dict__.clear()
    cache.append(0, keys[:, :, 130 - rows :], values[:, :, 130 - rows :])
    assert error(cache.attend(0, q, mask=mask), whole(q, keys, values, mask=mask)) < 1e-6


def test_a_disk_without_room_is_found_before_generation(tmp_path: Path) -> None:
    with pytest.raises(errors.DiskFullError) as raised:
        Disk(tmp_path, nbytes=1 << 60)
    assert raised.value.needed == 1 << 60 and list(tmp_path.iterdir()) == []


SHAPE = CacheShape(layers=2, batch=2, heads=4, kv_heads=2, width=16, value_width=16, itemsize=4)


@pytest.mark.parametrize("split", ["token", "layer", "head"])
@pytest.mark.parametrize("disk", [2.0, 40.0], ids=["slow disk", "fast disk"])
def test_what_the_host_cannot_hold_is_planned_for_the_disk(tmp_path: Path, split: Any, disk: float) -> None:
    """Bytes of all three as planned, and the predicted time within a fifth."""
    rates = Rates(device=700.0, host=60.0, link=12.0, wake_s=0.0, disk=disk)
    count, token = 4096, SHAPE.token_bytes
    nbytes = SHAPE.layers * count * token
    plan = plan_cache(
        SHAPE, count, device_bytes=nbytes // 2 + 128 * token, host_bytes=nbytes // 3, disk_bytes=nbytes, rates=rates, split=split,
        recent=256, chunk_bytes=64 * token, block_bytes=64 * token,
    )  # fmt: skip
    assert plan.disk_bytes > 0 and plan.host_bytes <= 0.9 * nbytes / 3 and "on the disk" in plan.explain()
    machine = VirtualMachine(rates)
    cache = TieredCache.from_plan(plan, machine, torch.float32, workers=2, disk=Disk(tmp_path, nbytes=plan.disk_bytes))
    held = torch.randn(2, 2, count, 16)
    for index in range(SHAPE.layers):
        for first in range(0, count, 512):
            cache.append(index, held[:, :, first : first + 512], held[:, :, first : first + 512])
    q = torch.randn(2, 4, 1, 16)
    begin = machine.now()
    found = [cache.attend(index, q) for index in range(SHAPE.layers)]
    assert machine.now() - begin == pytest.approx(plan.seconds, rel=0.2)
    assert error(found[-1], whole(q, held, held)) < 1e-6
    assert cache.device_bytes == pytest.approx(plan.device_bytes, rel=0.03) and cache.host_bytes == pytest.approx(plan.host_bytes, rel=0.03)
    assert cache.disk is not None and cache.disk.nbytes == plan.disk_bytes
    cache.release()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_can_be_measured(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert measure_disk(disk, sample_bytes=1 << 20) > 1 << 20 and not disk.store.segments
    disk.close()


def test_a_plan_that_even_the_disk_cannot_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(errors.PlanError, match=r"on the host, of which .* may be used and .* on a disk with 64.00 KiB"):
        plan_cache(SHAPE, 100_000, device_bytes=1 << 20, host_bytes=1 << 20, disk_bytes=1 << 16, rates=RATES, chunk_bytes=1 << 16)


def test_files_are_private_and_a_killed_process_leaves_none(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import os, signal, sys, torch
        from torchwrap.attention.cooperative.disk import Disk
        disk = Disk({str(tmp_path)!r})
        disk.write(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4))
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    found = subprocess.run([sys.executable, "-c", program], check=False, env=dict(os.environ), timeout=240)
    assert found.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in left[0].iterdir())
    disk = Disk(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [disk.store.folder.name] != [left[0].name]
    disk.close()
    assert list(tmp_path.iterdir()) == []
