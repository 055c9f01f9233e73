"""What importing loads, names that are both a package and a callable, and rules of the code that a search can check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchwrap as tw

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("transformers", "accelerate", "torchvision", "diffusers", "peft", "timm", "tqdm", "matplotlib", "torch._dynamo")


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def test_every_public_name_resolves_without_any_framework() -> None:
    code = (
        "import sys\n"
        f"for name in {[name for name in FRAMEWORKS if name != 'torch._dynamo']}: sys.modules[name] = None\n"
        "import torchwrap\n"
        "for name in torchwrap.__all__: getattr(torchwrap, name)\n"
        "assert set(torchwrap.__all__) <= set(dir(torchwrap))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    assert _run(code) == "False"


def test_importing_loads_no_framework_and_not_dynamo() -> None:
    loaded = _run("import sys, torch; before = set(sys.modules); import torchwrap; print(*(set(sys.modules) - before))").split()
    assert not {name for name in loaded if name in FRAMEWORKS or name.split(".")[0] in FRAMEWORKS}
    assert len(loaded) < 10, "counted in modules, which unlike seconds do not depend on how busy the machine is"


ORDERS = {
    "callables first": "import torchwrap; torchwrap.trace; torchwrap.core.tensors; import torchwrap.trace.config, torchwrap.core.tensors",
    "submodules first": "import torchwrap.trace.config, torchwrap.core.tensors; import torchwrap",
    "from imports": "from torchwrap.trace.config import Trace; from torchwrap import trace; import torchwrap",
    "technique module": "from torchwrap.trace.technique import trace; import torchwrap; assert torchwrap.trace is trace",
}


# torch takes longer to import than everything else: each order in a fork of a process that has it.
_IN_FORKS = """
import os, sys, torch, traceback
for name, order in {orders!r}.items():
    if not os.fork():
        try:
            exec(order + {rest!r}, {{}})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(name if os.wait()[1] == 0 else "failed: " + name)
"""
_REST = """
import torch
model = torch.nn.Linear(2, 2)
assert torchwrap.trace(model) is model and torchwrap.unwrap(model) is model
with torchwrap.core.tensors(model, 'weight') as real: assert list(real) == ['weight']
import torchwrap.trace.technique, torchwrap.core.tensors as tensors
assert torchwrap.trace.config.Trace is torchwrap.Trace and callable(torchwrap.trace) and callable(tensors)
"""


def test_name_that_is_also_a_package_is_the_callable_in_any_order_of_imports() -> None:
    orders = {name: f"import warnings; warnings.simplefilter('error')\n{order}" for name, order in ORDERS.items()}
    assert _run(_IN_FORKS.format(orders=orders, rest=_REST)).splitlines() == list(ORDERS)


def test_callable_names_cannot_be_assigned_and_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError):
        tw.trace = 3  # type: ignore[assignment]
    for owner in (tw, tw.trace, tw.core):
        with pytest.raises(AttributeError, match="no_such_name"):
            owner.no_such_name  # noqa: B018


def _sources(*folders: str) -> list[Path]:
    found = [file.relative_to(ROOT) for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file for file in found if file.parts[:2] != ("torchwrap", "integrations")]  # a link to integrations/


def _lines(pattern: str, *folders: str, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{file}:{number}: {line.strip()}"
        for file in _sources(*folders)
        if str(file) not in but
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1)
        if re.search(pattern, line) and not line.strip().startswith(("#", '"'))
    ]


def test_only_swap_assigns_the_class_of_a_module() -> None:
    found = _lines(r"__class__\s*=[^=]|__class__\",", "torchwrap", "integrations", but=("torchwrap/core/swap.py",))
    assert [line for line in found if "sys.modules[__name__].__class__" not in line] == []


def test_core_names_no_framework_in_an_import() -> None:
    frameworks = "transformers|accelerate|torchvision|diffusers|peft|timm|deepspeed|bitsandbytes|torchao"
    assert _lines(rf"^\s*(from|import) ({frameworks})", "torchwrap/core", "torchwrap/trace") == []


def test_only_tensors_touches_data() -> None:
    assert _lines(r"\.data\s*=[^=]|\.set_\(", "torchwrap/core", "torchwrap/trace", but=("torchwrap/core/tensors.py",)) == []
