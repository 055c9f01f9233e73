"""Rules of the house that no linter knows: each file that may do something dangerous is named, and nobody else does it.

The rules are tables of (pattern, who may, why). A file that needs an exemption stands in its rule's table with the reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = [path for path in sorted((ROOT / "torchwrap").rglob("*.py")) if "integrations" not in path.parts]
INTEGRATIONS = sorted((ROOT / "integrations").rglob("*.py"))
EVERYTHING = LIBRARY + INTEGRATIONS

FRAMEWORKS = {"transformers", "torchvision", "accelerate", "diffusers", "timm", "peft", "bitsandbytes", "torchao", "deepspeed", "lightning"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), filename=str(path)))


def targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []


def sets_class(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
        return any(isinstance(argument, ast.Constant) and argument.value == "__class__" for argument in node.args)
    return any(isinstance(target, ast.Attribute) and target.attr == "__class__" for target in targets(node))


def test_only_swap_assigns_a_class_to_an_object() -> None:
    found = {name_of(path) for path in EVERYTHING for node in nodes(path) if sets_class(node)}
    # The two packages with a function's name change the class of their own module object, never of a model (see core/__init__.py).
    assert found - {"torchwrap/__init__.py", "torchwrap/core/__init__.py"} == {"torchwrap/core/swap.py"}


def opens_for_writing(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    if called in {"write_text", "write_bytes", "save_file", "mkstemp", "NamedTemporaryFile"}:
        return True
    if called != "open":
        return False
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if owner == "os":
        return any(flag in ast.unparse(node) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")) and "devnull" not in ast.unparse(node)
    arguments = node.args[1:] if isinstance(function, ast.Name) else node.args
    modes = [*arguments, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) & set("wax+") for mode in modes)


def test_only_storage_opens_files_for_writing() -> None:
    exempt = {
        "torchwrap/cli/limit.py": "writes control files of the kernel, no data",
        "torchwrap/demo/weights.py": "converts the demonstration's weights into the user's cache folder, once",
    }
    found = {name_of(path) for path in EVERYTHING for node in nodes(path) if opens_for_writing(node)}
    assert {name for name in found if not name.startswith("torchwrap/storage/")} == set(exempt)


def changes_storage(node: ast.AST) -> bool:
    """Gives a tensor other memory: `x.data = y`, `x.set_(...)`, `storage.resize_(...)`. Asking for sizes and addresses is no change."""
    # Attribute `.data` is also an ordinary field name of records, which assign it to themselves.
    if any(isinstance(target, ast.Attribute) and target.attr == "data" and ast.unparse(target.value) != "self" for target in targets(node)):
        return True
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"set_", "resize_", "storage"}


def test_only_tensors_gives_parameters_other_memory() -> None:
    found = {name_of(path) for path in EVERYTHING for node in nodes(path) if changes_storage(node)}
    assert found == {"torchwrap/core/tensors.py"}


def imported_frameworks(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found & FRAMEWORKS


def test_only_integrations_and_programs_name_a_framework() -> None:
    # cli and demo are programs on top of the library and may import everything; the library proper may not.
    programs = ("torchwrap/cli/", "torchwrap/demo/")
    found = {name_of(path): imported_frameworks(path) for path in LIBRARY}
    assert {name: used for name, used in found.items() if used and not name.startswith(programs)} == {}


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_frameworks_and_slow_imports_are_never_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = set()
    for node in top:
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or ""}
    roots = {name.partition(".")[0] for name in names}
    slow = {"matplotlib", "tqdm"} | (set() if path in INTEGRATIONS else FRAMEWORKS)
    assert roots & slow == set()
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in names)


@pytest.mark.parametrize("path", [path for path in EVERYTHING if path.read_text().strip()], ids=name_of)
def test_every_file_opens_with_its_subject_and_names_what_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file has no opening comment"
    named = [target for node in tree.body for target in targets(node) if isinstance(target, ast.Name) and target.id == "__all__"]
    assert named or len(tree.body) == 1, "the file has no __all__"


def test_library_prints_only_in_programs() -> None:
    found = {
        name_of(path)
        for path in EVERYTHING
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {name for name in found if not name.startswith(("torchwrap/cli/", "torchwrap/demo/"))} == set()


def test_no_assertion_guards_what_a_user_gives() -> None:
    """`assert` is for types that a checker cannot follow, never with a message for a person."""
    found = [f"{name_of(path)}:{node.lineno}" for path in EVERYTHING for node in nodes(path) if isinstance(node, ast.Assert) and node.msg]
    assert found == []


def test_no_unfinished_work_is_marked_without_an_issue() -> None:
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\s*\(?#\d)")
    found = [
        f"{name_of(path)}:{number}"
        for path in EVERYTHING
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
