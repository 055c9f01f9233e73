"""Nothing public is undocumented, and the generated parts of the documentation cover all there is to cover."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torchwrap
from torchwrap.cli.__main__ import COMMANDS
from torchwrap.core import errors

ROOT = Path(__file__).parents[2]


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documentation_hook", ROOT / "docs" / "hooks" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HOOK = load_hook()
# `Layer.replace` is an attribute that may hold a method; its documentation stands below the attribute.
DOCUMENTED_AS_ATTRIBUTE = {"RowLayer.replace"}
MODULES = [
    found.name
    for found in pkgutil.walk_packages(torchwrap.__path__, "torchwrap.")
    if not found.name.rpartition(".")[2].startswith("_") or found.name.endswith("__main__")
]


def public_things(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public names defined in this module, and the public methods and properties of its classes."""
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            yield name, thing
            for member, value in vars(thing).items():
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))):
                    yield f"{name}.{member}", value
        elif inspect.isroutine(thing):
            yield name, thing


def documented(thing: object) -> bool:
    return bool((getattr(thing, "__doc__", None) or "").strip())


def documented_elsewhere(module: ModuleType, cls: type, member: str) -> bool:
    """By a class it inherits from, or by the protocol of the same module that it implements."""
    protocols = [thing for thing in vars(module).values() if inspect.isclass(thing) and getattr(thing, "_is_protocol", False)]
    return any(documented(vars(base).get(member)) for base in (*cls.__mro__[1:], *protocols) if member in vars(base))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    missing = []
    for path, thing in public_things(module):
        cls, _, member = path.rpartition(".")
        if path in DOCUMENTED_AS_ATTRIBUTE or documented(thing):
            continue
        if not (cls and documented_elsewhere(module, getattr(module, cls), member)):
            missing.append(f"{name}.{path}")
    assert missing == []


def test_every_top_level_name_is_on_the_public_interface_page() -> None:
    page = (ROOT / "docs" / "api" / "index.md").read_text()
    named = set(re.findall(r"`tw\.([A-Za-z_]+)", page))
    exceptions = {
        name for name in torchwrap.__all__ if isinstance(getattr(torchwrap, name), type) and issubclass(getattr(torchwrap, name), Exception)
    }
    assert set(torchwrap.__all__) - exceptions - named - {"__version__"} == set()


def test_handbook_has_one_section_for_every_error() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    headings = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    markers = re.findall(r"^<!-- generated: error (\w+) -->$", page, re.MULTILINE)
    assert sorted(headings) == sorted(errors.__all__)
    assert markers == headings


def test_handbook_shows_every_message_the_library_raises() -> None:
    page = HOOK.fill((ROOT / "docs" / "failures.md").read_text())
    found = HOOK.messages()
    assert len(found) > 100
    assert [message for message in found if HOOK._code(message.what) not in page] == []


@pytest.mark.parametrize("error", [name for name in errors.__all__ if name != "TorchwrapError"])
def test_every_error_class_is_raised_somewhere(error: str) -> None:
    assert any(message.error == error for message in HOOK.messages())


def test_every_error_says_what_to_do_or_why_not() -> None:
    """A message without a way out is for states that have none; most must have one."""
    found = [message for message in HOOK.messages() if message.error not in ("TorchwrapWarning",)]
    helpful = [message for message in found if message.fix]
    assert len(helpful) / len(found) > 0.6


def test_error_messages_name_values_not_only_words() -> None:
    text = str(
        errors.BudgetError("a budget of 1 KiB is too small", needed=2048, available=1024, where="blocks.0", fix="Set device_memory=2048.")
    )
    assert text == "a budget of 1 KiB is too small (at blocks.0). Set device_memory=2048."


@pytest.mark.parametrize("command", COMMANDS)
def test_command_page_shows_every_command(command: str) -> None:
    page = HOOK.fill((ROOT / "docs" / "command-line.md").read_text())
    assert f"usage: torchwrap {command}" in page


def test_offload_guide_documents_every_field() -> None:
    import dataclasses

    page = HOOK.fill((ROOT / "docs" / "offload.md").read_text())
    for field in dataclasses.fields(torchwrap.Offload):
        assert f"| `{field.name}` |" in page
        assert field.metadata["doc"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in navigation} == set()


def test_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    sections = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    kinds = set(re.findall(r"^### (\w+)", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
