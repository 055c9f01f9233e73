"""Files that change under a wrapped model: edited, cut, replaced, deleted, with and without an honest time stamp."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.disks import settle
from tests.faults.subjects import at_rest, lean, llama, probe, right_again, tower, twin_of
from tests.faults.tally import Faults, same
from torchwrap.core.errors import CorruptDataError
from torchwrap.stream.units import Home

Edit = Callable[[Path, Home, Home], None]
"""(file, two tensors of one size in it): change the file."""


def home_of(model: nn.Module, name: str) -> Home:
    """Where a parameter is stored."""
    home = next(piece.home for piece in tw.handle_of(model, "offload").pieces if name in piece.names)
    assert home is not None
    return home


def flip(path: Path, one: Home, _: Home) -> None:
    _overwrite(path, one.offset + one.nbytes // 2, lambda old: bytes([old[0] ^ 4]), 1)


def zero(path: Path, one: Home, _: Home) -> None:
    _overwrite(path, one.offset, lambda old: bytes(len(old)), 4096)


def exchange(path: Path, one: Home, other: Home) -> None:
    content = path.read_bytes()
    first, second = (content[home.offset : home.offset + home.nbytes] for home in (one, other))
    _overwrite(path, one.offset, lambda _: second, one.nbytes)
    _overwrite(path, other.offset, lambda _: first, one.nbytes)


def exchange_blocks(path: Path, one: Home, _: Home) -> None:
    content = path.read_bytes()[one.offset : one.offset + 8192]
    _overwrite(path, one.offset, lambda _: content[4096:] + content[:4096], 8192)


def cut(path: Path, one: Home, _: Home) -> None:
    os.truncate(path, one.offset + one.nbytes // 2)


def empty(path: Path, *_: Home) -> None:
    os.truncate(path, 0)


def replace(path: Path, one: Home, other: Home) -> None:
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    os.replace(copy, path)


def touch(path: Path, *_: Home) -> None:
    os.utime(path, ns=(0, 0))


def delete(path: Path, *_: Home) -> None:
    path.unlink()


def _overwrite(path: Path, offset: int, change: Callable[[bytes], bytes], nbytes: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(nbytes)
        file.seek(offset)
        file.write(change(old))


@contextmanager
def edited(model: nn.Module, path: Path, edit: Edit, one: Home, other: Home, *, honest: bool) -> Iterator[None]:
    """The file is changed within the block and as it was afterwards, same inode and times; unless `honest`, its times never show it.

    What the model reads ahead is complete before the file is restored, so that all of it saw the fault.
    """
    saved, before = path.with_suffix(".saved"), os.stat(path)
    os.link(path, saved)
    content = path.read_bytes()
    edit(path, one, other)
    if not honest and path.exists():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        yield
        if tw.wrappers_of(model):
            settle(model)
    finally:
        saved.write_bytes(content)
        os.utime(saved, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(saved, path) if not path.exists() or not os.path.samefile(saved, path) else saved.unlink()


TENSORS = {"tower": ("blocks.1.up.weight", "blocks.2.up.weight"), "llama": (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
)}  # fmt: skip


def spilled(name: str, folder: Path, **fields: str) -> nn.Module:
    """Served from our own file."""
    return lean({"tower": tower, "llama": llama}[name](), path=str(folder / "spill"), **fields)


def opened(name: str, folder: Path, **fields: str) -> nn.Module:
    """Served from the user's checkpoint, never having been in memory."""
    llama().save_pretrained(folder / "checkpoint")
    return tw.offload.from_pretrained(folder / "checkpoint", params="disk", **fields)


def adopted(name: str, folder: Path, **fields: str) -> nn.Module:
    """In memory first, then served from the checkpoint that it was loaded from."""
    from transformers import LlamaForCausalLM

    llama().save_pretrained(folder / "checkpoint")
    model = lean(LlamaForCausalLM.from_pretrained(folder / "checkpoint").eval(), **fields)
    for piece in tw.handle_of(model, "offload").pieces:
        if piece.resident:  # transformers maps weights: with or without us, what stays would go with the file
            piece.parameter.data = piece.parameter.data.clone()
    return model


SERVED = {
    "spilled-tower": ("tower", spilled),
    "spilled-llama": ("llama", spilled),
    "opened": ("llama", opened),
    "adopted": ("llama", adopted),
}

every_way = pytest.mark.parametrize("way", SERVED)


def served(way: str, folder: Path, **fields: str) -> tuple[nn.Module, torch.Tensor, Path, tuple[Home, Home]]:
    """A wrapped model, what it must give, the file it is served from, and two of its tensors there."""
    name, make = SERVED[way]
    model = make(name, folder, **fields)
    one, other = (home_of(model, tensor) for tensor in TENSORS[name])
    assert one.file is other.file and one.nbytes == other.nbytes
    return model, twin_of({"tower": tower, "llama": llama}[name]), Path(one.file.path), (one, other)


def used(model: nn.Module, expected: torch.Tensor) -> None:
    """Two passes without fault: schedule and sums are known. What is read ahead is dropped, so that the next call reads all."""
    for _ in range(2):
        assert same(probe(model), expected)
    settle(model)
    tw.handle_of(model, "offload").trim()


SILENT = {"flip": flip, "zero": zero, "exchange": exchange}
LOUD = {"cut": cut, "empty": empty, "replace": replace}


@every_way
@pytest.mark.parametrize("edit", [*SILENT, *LOUD])
def test_changed_behind_our_back(way: str, edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served(way, tmp_path)
    used(model, expected)
    with edited(model, path, (SILENT | LOUD)[edit], *tensors, honest=False):
        for _ in range(2):
            if outlived(way, edit):
                faults.survived(lambda: probe(model), expected)
            else:
                faults.detected(lambda: probe(model), CorruptDataError, says=[path])
            at_rest(model)
    right_again(model, expected)


def outlived(way: str, edit: str) -> bool:
    """Another file under the name of a checkpoint harms nobody: the one that was opened is still there, as it was."""
    return edit == "replace" and way in ("opened", "adopted")


@every_way
@pytest.mark.parametrize("edit", [*SILENT, *LOUD])
def test_changed_behind_our_back_while_units_are_read_ahead(way: str, edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served(way, tmp_path)
    for _ in range(2):
        assert same(probe(model), expected)
    settle(model)
    with edited(model, path, (SILENT | LOUD)[edit], *tensors, honest=False):
        for _ in range(3):
            faults.judged(lambda: probe(model), expected, CorruptDataError)
            at_rest(model)
    right_again(model, expected)


@pytest.mark.parametrize("way", ["opened", "adopted"])
@pytest.mark.parametrize("edit", [flip, touch, replace, cut], ids=["flip", "touch", "replace", "cut"])
def test_checkpoint_written_to_by_its_owner(way: str, edit: Edit, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served(way, tmp_path)
    used(model, expected)
    with edited(model, path, edit, *tensors, honest=True):
        if edit is replace:
            faults.survived(lambda: probe(model), expected)
        else:
            faults.detected(lambda: probe(model), CorruptDataError, says=[path, "unwrap"])
        at_rest(model)
    right_again(model, expected)


@pytest.mark.parametrize("way", ["spilled-tower", "spilled-llama", "adopted"])
@pytest.mark.parametrize("edit", SILENT)
def test_changed_before_anything_was_read(way: str, edit: str, tmp_path: Path, faults: Faults) -> None:
    """The values were in memory when the model was wrapped, so they are known from then on."""
    model, expected, path, tensors = served(way, tmp_path)
    with edited(model, path, SILENT[edit], *tensors, honest=False):
        faults.detected(lambda: probe(model), CorruptDataError, says=[path])
    right_again(model, expected)


@every_way
def test_blocks_of_one_tensor_exchanged(way: str, tmp_path: Path, faults: Faults) -> None:
    """A sum of words does not see their order; `verify="always"` promises to."""
    model, expected, path, tensors = served(way, tmp_path, verify="always")
    used(model, expected)
    with edited(model, path, exchange_blocks, *tensors, honest=False):
        faults.detected(lambda: probe(model), CorruptDataError, says=[path])
    right_again(model, expected)


@every_way
def test_deleted_files_are_served_until_the_end(way: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, _ = served(way, tmp_path)
    used(model, expected)
    shutil.rmtree(path.parent)
    for _ in range(2):
        faults.survived(lambda: probe(model), expected)
    faults.survived(lambda: probe(tw.unwrap(model)), expected)


@every_way
@pytest.mark.parametrize("edit", [*SILENT, *LOUD])
def test_unwrap_gives_right_weights_or_none(way: str, edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served(way, tmp_path)
    used(model, expected)
    with edited(model, path, (SILENT | LOUD)[edit], *tensors, honest=False):
        if outlived(way, edit):
            faults.survived(lambda: probe(tw.unwrap(model)), expected)
            return
        faults.detected(lambda: tw.unwrap(model), CorruptDataError, says=[path])
        assert "offload" in tw.wrappers_of(model)
    right_again(model, expected)


@every_way
@pytest.mark.parametrize("edit", [*SILENT, *LOUD])
def test_state_dict_gives_right_weights_or_none(way: str, edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served(way, tmp_path)
    used(model, expected)
    name = TENSORS[SERVED[way][0]][0]
    kept = {"tower": tower, "llama": llama}[SERVED[way][0]]().state_dict()[name]
    with edited(model, path, (SILENT | LOUD)[edit], *tensors, honest=False):
        if outlived(way, edit):
            faults.survived(lambda: model.state_dict()[name].clone(), kept)
        else:
            faults.detected(lambda: model.state_dict()[name].clone(), CorruptDataError, says=[path])
    assert torch.equal(model.state_dict()[name], kept)
    right_again(model, expected)


@pytest.mark.parametrize("way", ["spilled-tower", "opened"])
def test_a_state_dict_taken_before_a_file_was_cut_is_not_handed_out_again(way: str, tmp_path: Path, faults: Faults) -> None:
    """Its tensors lie over pages that are gone: touching one would end the process."""
    model, expected, path, tensors = served(way, tmp_path)
    used(model, expected)
    name = TENSORS[SERVED[way][0]][0]
    before = model.state_dict()
    with edited(model, path, cut, *tensors, honest=False):
        faults.detected(lambda: model.state_dict()[name] is before[name], CorruptDataError, says=[path])
    right_again(model, expected)


@pytest.mark.parametrize("edit", SILENT)
def test_values_lent_while_the_file_is_spoiled(edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, tensors = served("spilled-tower", tmp_path)
    used(model, expected)

    def borrowed() -> torch.Tensor:
        with tw.core.tensors(model, "blocks.1.up.weight") as real:
            return real["blocks.1.up.weight"].clone()

    with edited(model, path, SILENT[edit], *tensors, honest=False):
        faults.detected(borrowed, CorruptDataError, says=[path, "blocks.1.up.weight"])
    faults.survived(borrowed, tower().state_dict()["blocks.1.up.weight"])
    right_again(model, expected)


@pytest.mark.parametrize("edit", SILENT)
def test_a_table_spoiled_between_two_lookups(edit: str, tmp_path: Path, faults: Faults) -> None:
    model, expected, path, _ = served("spilled-tower", tmp_path)
    used(model, expected)
    table, head = home_of(model, "embed.weight"), home_of(model, "head.weight")
    with edited(model, path, SILENT[edit], table, head, honest=False):
        # Rows that no id names are not read, so what is not right must be found out.
        faults.judged(lambda: probe(model), expected, CorruptDataError, says=[path])
        at_rest(model)
    right_again(model, expected)


def test_bytes_of_an_earlier_generation(tmp_path: Path, faults: Faults) -> None:
    model, _, path, (old, _) = served("spilled-tower", tmp_path)
    stale = path.read_bytes()[old.offset : old.offset + old.nbytes]
    changed = {name: value + 1 for name, value in tower().state_dict().items()}
    model.load_state_dict(changed)
    plain = tower()
    plain.load_state_dict(changed)
    used(model, probe(plain))
    new = home_of(model, "blocks.1.up.weight")
    with edited(model, path, lambda file, one, _: _overwrite(file, one.offset, lambda _: stale, one.nbytes), new, new, honest=False):
        faults.detected(lambda: probe(model), CorruptDataError, says=[path])
    right_again(model, probe(plain))


def test_one_of_two_shards_changes(tmp_path: Path, faults: Faults) -> None:
    """The unit in use is in an intact file, the one read ahead is not: the first must not suffer from the second."""
    llama().save_pretrained(tmp_path / "checkpoint", max_shard_size="300KB")
    model = tw.offload.from_pretrained(tmp_path / "checkpoint", params="disk", k=2)
    expected = twin_of(llama)
    used(model, expected)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    paths = sorted({Path(home_of(model, name).file.path) for name in names})
    assert len(paths) > 1
    for path in paths:
        home = next(home_of(model, name) for name in names if Path(home_of(model, name).file.path) == path)
        with edited(model, path, touch, home, home, honest=True):
            for _ in range(2):
                faults.detected(lambda: probe(model), CorruptDataError, says=[path.name])
                at_rest(model)
        for _ in range(2):
            assert same(probe(model), expected)
    right_again(model, expected)
