"""`import torchwrap` is cheap and brings in nothing a user did not ask for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.sharing import made_once

FRAMEWORKS = (
    "transformers",
    "torchvision",
    "accelerate",
    "diffusers",
    "timm",
    "peft",
    "matplotlib",
    "tqdm",
    "torch._dynamo",
    "torch._inductor",
)


def python(code: str) -> str:
    """Run code in a fresh process without site customisation that could import torch first."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# torch itself may load parts of the compiler in some versions: what counts is what torchwrap adds.
_IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import torchwrap
seconds, imported = time.perf_counter() - start, set(sys.modules) - before
for name in torchwrap.__all__:
    getattr(torchwrap, name)
print(json.dumps([sorted(imported), sorted(set(sys.modules) - before), seconds]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str], float]:
    """Modules that `import torchwrap` adds to torch's, those that all its names add, and the seconds of the import."""
    folder = made_once(tmp_path_factory, "imported", lambda folder: (folder / "said.json").write_text(python(_IMPORT)))
    added, with_names, seconds = json.loads((folder / "said.json").read_text())
    return added, with_names, seconds


def test_import_loads_no_framework_and_not_the_compiler(imported: tuple[list[str], list[str], float]) -> None:
    assert "torchwrap" in imported[0]
    assert [name for name in imported[0] if name.startswith(FRAMEWORKS)] == []
    # Time is never asserted in tests (style): the figure is shown with `pytest -s`, the budget is 50 ms.
    print(f"import torchwrap: {imported[2] * 1e3:.1f} ms beyond torch")


def test_every_public_name_loads_without_a_framework(imported: tuple[list[str], list[str], float]) -> None:
    assert [name for name in imported[1] if name.startswith(FRAMEWORKS)] == []


def test_help_needs_no_torch() -> None:
    code = "import sys; from torchwrap.cli.__main__ import main; main(['plan', '--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False"
