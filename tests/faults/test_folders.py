"""Checkpoint folders that are not what they should be: a typed error names the file, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchwrap as tw
from tests.faults.disks import beneath_all, erring
from tests.faults.subjects import at_rest, llama, probe, twin_of
from tests.faults.tally import Faults, same
from tests.models import by_name
from torchwrap.core.errors import CorruptDataError, StorageError, UnsafePathError, UnsupportedModelError

NAME = "model.layers.1.mlp.up_proj.weight"


def saved(folder: Path, *, sharded: bool = False) -> Path:
    """A checkpoint of a small Llama."""
    llama().save_pretrained(folder, max_shard_size="200KB" if sharded else "1GB")
    return folder


def open_it(folder: Path) -> nn.Module:
    """What a user does."""
    return tw.offload.from_pretrained(folder, params="disk")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a file's header; the data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    made = change(header)
    raw = made if isinstance(made, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def truncate(path: Path, nbytes: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(nbytes if nbytes >= 0 else path.stat().st_size + nbytes)


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file and write it well-formed."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


BREAKS: dict[str, Callable[[Path], object]] = {
    "missing-folder": lambda folder: shutil.rmtree(folder),
    "a-file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "empty-folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "config-is-no-json": lambda folder: (folder / "config.json").write_text("{"),
    "config-of-unknown-model": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "nobody-knows", "architectures": ["Nope"]}'
    ),
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "only-bin": lambda folder: (torch.save(llama().state_dict(), folder / "pytorch_model.bin"), (folder / "model.safetensors").unlink()),
    "empty-file": lambda folder: truncate(folder / "model.safetensors", 0),
    "seven-bytes": lambda folder: truncate(folder / "model.safetensors", 7),
    "cut-in-header": lambda folder: truncate(folder / "model.safetensors", 100),
    "cut-in-data": lambda folder: truncate(folder / "model.safetensors", -4),
    "cut-in-half": lambda folder: truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2),
    "longer": lambda folder: (folder / "model.safetensors").open("ab").write(b"12345678"),
    "huge-header": lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + bytes(100)),
    "header-no-json": lambda folder: with_header(folder / "model.safetensors", lambda header: b"{not json}"),
    "header-a-list": lambda folder: with_header(folder / "model.safetensors", lambda header: b"[]"),
    "overlap": lambda folder: with_header(
        folder / "model.safetensors", lambda header: header[NAME].__setitem__("data_offsets", [0, 32768]) and None
    ),
    "offset-behind-the-end": lambda folder: with_header(
        folder / "model.safetensors", lambda header: header[NAME].__setitem__("data_offsets", [1 << 40, (1 << 40) + 32768])
    ),
    "unknown-dtype": lambda folder: with_header(folder / "model.safetensors", lambda header: header[NAME].__setitem__("dtype", "F7")),
    "shape-and-bytes-differ": lambda folder: with_header(
        folder / "model.safetensors", lambda header: header[NAME].__setitem__("shape", [128, 63])
    ),
    "other-shape": lambda folder: edit_weights(folder / "model.safetensors", lambda w: w.__setitem__(NAME, torch.zeros(127, 64))),
    "transposed": lambda folder: edit_weights(folder / "model.safetensors", lambda w: w.__setitem__(NAME, w[NAME].t().contiguous())),
    "weight-missing": lambda folder: edit_weights(folder / "model.safetensors", lambda w: w.pop(NAME)),
    "folder-in-place-of-file": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    "link-to-nowhere": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to(folder / "nowhere"),
    ),
    "quantised": lambda folder: (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    ),
}

SHARD_BREAKS: dict[str, Callable[[Path], object]] = {
    "missing-shard": lambda folder: shards(folder)[1].unlink(),
    "truncated-shard": lambda folder: truncate(shards(folder)[1], -8),
    "empty-shard": lambda folder: truncate(shards(folder)[1], 0),
    "swapped-shards": lambda folder: _swap(*shards(folder)[:2]),
    "index-is-no-json": lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    "index-without-map": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "index-leaves-folder": lambda folder: _point(folder, "../elsewhere.safetensors"),
    "index-is-absolute": lambda folder: _point(folder, "/etc/passwd"),
    "index-to-missing": lambda folder: _point(folder, "model-9.safetensors"),
    "index-missing": lambda folder: (folder / "model.safetensors.index.json").unlink(),
}


CORRUPT = (
    *("cut", "header", "empty-file", "seven", "overlap", "offset", "shape-and", "huge", "longer"),
    *("truncated", "empty-shard", "index-is-no"),
)
"""What breaks a rule of the format, by the beginning of its name."""


def _swap(one: Path, other: Path) -> None:
    middle = one.with_suffix(".middle")
    one.rename(middle)
    other.rename(one)
    middle.rename(other)


def _point(folder: Path, target: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = target
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("broken", [*BREAKS, *SHARD_BREAKS])
def test_broken_checkpoint_folders(broken: str, tmp_path: Path, faults: Faults) -> None:
    folder = saved(tmp_path / "checkpoint", sharded=broken in SHARD_BREAKS)
    (BREAKS | SHARD_BREAKS)[broken](folder)
    # Swapped shards hold all weights, under other file names: as transformers goes by the keys in the files, both results are right.
    _, found = faults.judged(lambda: probe(open_it(folder)), twin_of(llama), UnsupportedModelError, StorageError)
    if found is None:
        assert broken == "swapped-shards"
        return
    assert str(tmp_path) in str(found), "the message does not say where"
    kinds: dict[str, Any] = {
        "index-leaves-folder": UnsafePathError,
        "index-is-absolute": UnsafePathError,
        "only-bin": UnsupportedModelError,
    }
    wanted = kinds.get(broken, CorruptDataError if broken.startswith(CORRUPT) else (UnsupportedModelError, StorageError))
    assert isinstance(found, wanted), f"{type(found).__name__}: {found}"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_tied_and_untied_folders_open_right(name: str, tmp_path: Path, faults: Faults) -> None:
    fixture = by_name(name)
    fixture.build().save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        expected = fixture.build()(**fixture.inputs()).logits
    with faults.intact(tmp_path / "checkpoint"):
        model = open_it(tmp_path / "checkpoint")
        with torch.no_grad():
            faults.survived(lambda: model(**fixture.inputs()).logits, expected)
            faults.survived(lambda: tw.unwrap(model)(**fixture.inputs()).logits, expected)
    assert len(model.state_dict()) == len(fixture.build().state_dict())


def test_tied_weights_stored_twice_and_different(tmp_path: Path, faults: Faults) -> None:
    from transformers import AutoModelForCausalLM

    fixture = by_name("llama-tied")
    folder = tmp_path / "checkpoint"
    fixture.build().save_pretrained(folder)
    edit_weights(folder / "model.safetensors", lambda w: w.__setitem__("lm_head.weight", w["model.embed_tokens.weight"] + 1))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = plain(**fixture.inputs()).logits
        with pytest.warns(tw.TorchwrapWarning, match="lm_head"):
            model = open_it(folder)
        faults.survived(lambda: model(**fixture.inputs()).logits, expected)


def test_a_weight_of_another_dtype_than_the_config(tmp_path: Path, faults: Faults) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "checkpoint")
    edit_weights(folder / "model.safetensors", lambda w: w.__setitem__(NAME, w[NAME].to(torch.bfloat16)))
    expected = probe(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    faults.judged(lambda: probe(open_it(folder)), expected, UnsupportedModelError, StorageError)


@pytest.mark.parametrize("number", range(0, 8))
def test_io_errors_while_opening(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    folder, expected = saved(tmp_path / "checkpoint"), twin_of(llama)
    beneath_all(monkeypatch, erring(number, number + 1))
    with faults.intact(folder):
        faults.judged(lambda: probe(open_it(folder)), expected, StorageError, says=[folder / "model.safetensors"])
        monkeypatch.undo()
        model = open_it(folder)
        assert same(probe(model), expected)
        at_rest(model)


def test_disk_full_while_converting(tmp_path: Path, faults: Faults) -> None:
    """Another dtype has to be written once; a folder that cannot take it is an error, and nothing stays there."""
    folder = saved(tmp_path / "checkpoint")
    with faults.intact(folder):
        faults.detected(
            lambda: tw.offload.from_pretrained(folder, params="disk", dtype=torch.bfloat16, path="/proc/torchwrap"), StorageError
        )


def test_a_folder_that_needs_no_conversion_opens_without_a_place_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    folder = tmp_path / "checkpoint"
    llama().save_pretrained(folder)
    nowhere = tmp_path / "nowhere"
    nowhere.write_bytes(b"a file")
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    model = faults.survived(lambda: tw.offload.from_pretrained(folder, params="disk"), lambda model: probe(model).isfinite().all())
    faults.survived(lambda: probe(model), twin_of(llama))
    faults.detected(lambda: tw.offload.from_pretrained(folder, params="disk", dtype=torch.bfloat16), StorageError, says=[nowhere])
    tw.unwrap(model)


def test_budget_too_small_for_a_folder(tmp_path: Path, faults: Faults) -> None:
    folder = saved(tmp_path / "checkpoint")
    found = faults.detected(lambda: tw.offload.from_pretrained(folder, device_memory=1000), tw.BudgetError)
    model = tw.offload.from_pretrained(folder, device_memory=found.needed)
    faults.survived(lambda: probe(model), twin_of(llama))


def test_folder_changed_between_opening_and_the_first_call(tmp_path: Path, faults: Faults) -> None:
    folder = saved(tmp_path / "checkpoint")
    model = open_it(folder)
    edit_weights(folder / "model.safetensors", lambda w: w.__setitem__(NAME, w[NAME] + 1))  # a new file takes the name
    faults.survived(lambda: probe(model), twin_of(llama))
    at_rest(model)
    faults.survived(lambda: probe(tw.unwrap(model)), twin_of(llama))
