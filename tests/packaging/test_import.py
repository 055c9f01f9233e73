"""`import torchwrap` is cheap and brings in nothing a user did not ask for."""

from __future__ import annotations

import json
import subprocess
import sys

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


def test_import_loads_no_framework_and_not_the_compiler() -> None:
    # torch itself may load parts of the compiler in some versions: what counts is what torchwrap adds.
    code = "import sys, json, torch; before = set(sys.modules); import torchwrap; print(json.dumps(sorted(set(sys.modules) - before)))"
    added = json.loads(python(code))
    assert [name for name in added if name.startswith(FRAMEWORKS)] == []


def test_every_public_name_loads_without_a_framework() -> None:
    code = (
        "import sys, json, torch; before = set(sys.modules); import torchwrap\n"
        "for name in torchwrap.__all__: getattr(torchwrap, name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(python(code))
    assert [name for name in added if name.startswith(FRAMEWORKS)] == []


def test_import_time_is_told() -> None:
    code = "import torch, time; t = time.perf_counter(); import torchwrap; print((time.perf_counter() - t) * 1e3)"
    milliseconds = min(float(python(code)) for _ in range(3))
    # Time is never asserted in tests (style): the figure is shown with `pytest -s`, the budget is 50 ms.
    print(f"import torchwrap: {milliseconds:.1f} ms beyond torch")


def test_help_needs_no_torch() -> None:
    code = "import sys; from torchwrap.cli.__main__ import main; main(['plan', '--help']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False"
