"""describe and verify: a whole checkpoint passes, and every way to break one is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import torchwrap as tw
from tests.cli.conftest import Done


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_describe_adds_up_to_the_files(cli: Callable[..., Done], pristine: Path) -> None:
    tensors = {name: tensor for path in shards(pristine) for name, tensor in load_file(path).items()}
    found = cli("describe", pristine, "--json").data
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["tensors"] == len(tensors)
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == sum(row["bytes"] for row in found["modules"])
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert "model.layers.*" in {row["name"] for row in found["modules"]}


def test_describe_lists_tensors_and_shows_the_plan(cli: Callable[..., Done], checkpoint: Path) -> None:
    model = tw.trace(torch.nn.Linear(2, 2))
    tw.plan_of(model).save(checkpoint)
    text = cli("describe", checkpoint, "--tensors").out
    assert "model.layers.7.mlp.down_proj.weight" in text
    assert "trace" in text and "plan of torchwrap" in text


def test_verify_passes_a_whole_checkpoint(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("verify", pristine, "--checksums", "--json")
    assert done.status == 0, done.data["findings"]
    assert done.data["findings"] == []
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards(pristine)}
    assert done.data["sha256"] == sums


def truncate(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def damage_header(folder: Path) -> str:
    path = shards(folder)[0]
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    return path.name


def remove_shard(folder: Path) -> str:
    path = shards(folder)[2]
    path.unlink()
    return path.name


def leave_the_folder(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    return "../model.safetensors"


def drop_a_tensor(folder: Path) -> str:
    path = shards(folder)[0]
    tensors = load_file(path)
    name = next(name for name in tensors if "layers" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    return name


def break_the_plan(folder: Path) -> str:
    (folder / "torchwrap.json").write_text('{"format": 99, "techniques": []}')
    return "torchwrap.json"


def break_the_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage",
    [truncate, damage_header, remove_shard, leave_the_folder, drop_a_tensor, break_the_plan, break_the_index],
    ids=lambda damage: damage.__name__.replace("_", "-"),
)
def test_verify_finds_and_names_the_damage(cli: Callable[..., Done], checkpoint: Path, damage: Callable[[Path], str]) -> None:
    culprit = damage(checkpoint)
    done = cli("verify", checkpoint, "--json")
    assert done.status == 1
    assert any(culprit in finding for finding in done.data["findings"]), done.data["findings"]


def test_verify_with_checksums_finds_a_changed_byte(cli: Callable[..., Done], checkpoint: Path) -> None:
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in shards(checkpoint)]
    (checkpoint / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    assert cli("verify", checkpoint, "--checksums").status == 0
    path = shards(checkpoint)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = cli("verify", checkpoint, "--checksums", "--json")
    assert done.status == 1
    assert path.name in done.data["findings"][0]


def test_verify_with_checksums_finds_nan_and_notes_zeros(cli: Callable[..., Done], tmp_path: Path) -> None:
    save_file({"bad": torch.full((2, 2), float("nan")), "blank": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    done = cli("verify", tmp_path, "--checksums", "--json")
    assert done.status == 1
    assert any("bad" in finding and "NaN" in finding for finding in done.data["findings"])
    assert any("blank" in note and "zero" in note for note in done.data["notes"])


def test_verify_of_an_empty_folder_is_a_negative_finding(cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("verify", tmp_path, "--json")
    assert done.status == 1
    assert "no safetensors file" in done.data["findings"][0]
