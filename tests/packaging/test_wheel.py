"""The built wheel holds the whole tree as real files, and works where only the four dependencies are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a fresh environment with torch, numpy and safetensors holds: those three and what torch itself requires.
ALLOWED = [
    "torch", "torchgen", "functorch", "numpy", "safetensors",
    "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock",
]  # fmt: skip

BLOCK = """
import json, sys
sys.path[:0] = [{target!r}]
allowed = set({allowed!r}) | {{"torchwrap"}} | set(sys.stdlib_module_names)
class OnlyDependencies:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, OnlyDependencies())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("torchwrap", "integrations"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # Without isolation: the test has to work without a network, and setuptools is one of the development requirements.
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("torchwrap-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, code: str) -> str:
    """Run code with the wheel first on the path and everything but the dependencies blocked."""
    script = BLOCK.format(target=str(installed), allowed=ALLOWED) + code
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # The current folder, which `-c` puts first on the path, is the wheel; the editable install's finder comes after it.
    done = subprocess.run([sys.executable, "-c", script], cwd=installed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchwrap").rglob("*.py")}
    tree = {name for name in tree if not name.startswith("torchwrap/integrations")}
    tree |= {"torchwrap/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "integrations").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
    assert shipped == tree
    assert "torchwrap/integrations/transformers/__init__.py" in shipped


def test_wheel_holds_no_symbolic_link_and_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]
        names = archive.namelist()
    assert links == []
    assert "torchwrap/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_declares_only_the_four_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    plain = sorted(line for line in required if "extra ==" not in line)
    assert [line.split(">")[0] for line in plain] == ["numpy", "safetensors", "torch"]


def test_wheel_imports_and_works_without_any_framework(installed: Path) -> None:
    code = """
import torch, torchwrap
assert torchwrap.__file__.startswith({target!r}), torchwrap.__file__
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6))).eval()
x = torch.ones(2, 64)
with torch.no_grad():
    before = model(x)
    torchwrap.offload(model, device_memory=60_000)
    equal = torch.equal(model(x), before)
    torchwrap.unwrap(model)
    print(equal, torch.equal(model(x), before))
""".replace("{target!r}", repr(str(installed)))
    assert run(installed, code).split() == ["True", "True"]


def test_every_module_of_the_wheel_imports_without_a_framework(installed: Path) -> None:
    code = """
import importlib, pkgutil, torchwrap
def names():
    for found in pkgutil.walk_packages(torchwrap.__path__, "torchwrap."):
        if not found.name.endswith("__main__"):
            yield found.name
failed = {}
for name in names():
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""
    failed = json.loads(run(installed, code))
    # Integrations name their framework and may need it; nothing else may.
    assert {name for name in failed if not name.startswith("torchwrap.integrations.")} == set()
