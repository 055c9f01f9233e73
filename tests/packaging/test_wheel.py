"""The built wheel holds the whole tree as real files, and works where only the four dependencies are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.sharing import made_once

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

# Knows no instruction set beyond the processor's baseline, whose kernels the build then leaves out, and takes no time to make what it
# knows fast: compiling everything as the set-up does takes minutes of a core, and no test here is about that.
OLD_COMPILER = f"""#!/bin/sh
case " $* " in *" -mavx"*) exit 1;; esac
exec {shutil.which("c++") or "g++"} "$@"
"""


def copy_tree(to: Path) -> None:
    """What a checkout holds, without what was built in it."""
    to.mkdir()
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("torchwrap", "integrations"):
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=hidden)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)


def build(what: str, source: Path, into: Path, **environment: str) -> None:
    """Without isolation: the test has to work without a network, and setuptools is one of the development requirements."""
    code = f"from setuptools import build_meta; import sys; build_meta.build_{what}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(into)]
    done = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        copy_tree(folder / "source")
        build("sdist", folder / "source", folder)

    return next(made_once(tmp_path_factory, "sdist", make).glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that whatever the sdist lacks is missing here too."""

    def make(folder: Path) -> None:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source, compiler = next(folder.iterdir()), folder / "compiler"
        compiler.write_text(OLD_COMPILER)
        compiler.chmod(0o700)
        build("wheel", source, folder, TORCHWRAP_CXXFLAGS="-O0", CC=str(compiler), CXX=str(compiler))

    return next(made_once(tmp_path_factory, "wheel", make).glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        copy_tree(folder / "source")
        build("wheel", folder / "source", folder, CC="/nonexistent/cc", CXX="/nonexistent/c++")

    return next(made_once(tmp_path_factory, "uncompiled", make).glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(target: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)

    return made_once(tmp_path_factory, "installed", make)


def run(installed: Path, code: str) -> str:
    """Run code with the wheel first on the path and everything but the dependencies blocked."""
    script = BLOCK.format(target=str(installed), allowed=ALLOWED) + code
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # The current folder, which `-c` puts first on the path, is the wheel; the editable install's finder comes after it.
    done = subprocess.run([sys.executable, "-c", script], cwd=installed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def modules_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith(".py")}


def test_wheel_holds_every_module_of_the_tree(wheel: Path, wheel_without_compiler: Path) -> None:
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchwrap").rglob("*.py")}
    tree = {name for name in tree if not name.startswith("torchwrap/integrations")}
    tree |= {"torchwrap/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "integrations").rglob("*.py")}
    assert modules_of(wheel) == tree
    assert modules_of(wheel_without_compiler) == tree
    assert "torchwrap/integrations/transformers/__init__.py" in tree


def test_sdist_holds_the_sources_of_the_kernels(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        shipped = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchwrap" / "native" / "src").iterdir()}
    assert sources | {"setup.py", "torchwrap/native/library.py"} <= shipped
    assert not any(name.endswith(".so") for name in shipped)


def test_wheel_holds_the_sources_that_are_compiled_when_needed(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchwrap" / "attention" / "cuda" / "kernels").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        assert sources and sources <= set(archive.namelist())


KERNELS = "torchwrap/native/kernels.native.so"


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_wheel_carries_the_kernels_and_is_tagged_for_the_platform_but_no_python(wheel: Path, installed: Path) -> None:
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        assert KERNELS in archive.namelist()
    assert run(installed, "from torchwrap import native; print(native.available())").split() == ["True"]


def test_wheel_made_without_a_compiler_is_for_any_platform_and_says_why_it_has_no_kernels(
    wheel_without_compiler: Path, tmp_path: Path
) -> None:
    assert wheel_without_compiler.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel_without_compiler) as archive:
        assert KERNELS not in archive.namelist()
        archive.extractall(tmp_path)
    said = run(tmp_path, "from torchwrap import native; print(native.available(), native.reason())")
    assert said.startswith("False it was not built")


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
    # Integrations name their framework and may need it, and kernels are written in triton; nothing else may.
    optional = ("torchwrap.integrations.", "torchwrap.attention.triton._")
    assert {name for name in failed if not name.startswith(optional)} == set()
