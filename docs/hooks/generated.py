"""Fills the generated parts of the documentation from the library itself, so that they cannot fall behind it.

A page holds a marker, `<!-- generated: KIND NAME -->`, and the marker is replaced by what the code says: an error class with every message
that is raised with it, the fields of a config, the help text of a command, the changelog. tests/docs checks that nothing is left out.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Message", "fill", "messages", "on_page_markdown"]

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^<!-- generated: (?P<kind>\w+) ?(?P<name>[\w.]*) -->$", re.MULTILINE)
SOURCES = ("torchwrap", "integrations")


@dataclass(frozen=True, order=True)
class Message:
    """One place in the code that makes an error: its class, file, and the text with `<values>` left open."""

    error: str
    file: str
    what: str
    fix: str


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Replace every marker of a page."""
    return MARKER.sub(lambda found: _KINDS[found["kind"]](found["name"]), markdown)


def messages() -> list[Message]:
    """Every message with which the library makes one of its errors, read from the source."""
    found: set[Message] = set()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "torchwrap" and "integrations" in path.parts:
                continue
            found |= _messages_of(path, path.stat().st_mtime_ns)
    return sorted(found)


@functools.cache
def _messages_of(path: Path, changed_ns: int) -> frozenset[Message]:
    """Those of one file. Kept, because every error's section of the handbook asks for all of them."""
    from torchwrap.core import errors

    found = set()
    for call, name in _error_calls(ast.parse(path.read_text()), set(errors.__all__)):
        what, fix = _template(call.args[0]) if call.args else "", ""
        for keyword in call.keywords:
            if keyword.arg == "fix":
                fix = _template(keyword.value)
        if what:
            found.add(Message(name, path.relative_to(ROOT).as_posix(), what, fix))
    return frozenset(found)


def _error_calls(tree: ast.AST, names: set[str]) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if called in names:
                yield node, called
            elif called == "warn" and any(ast.unparse(argument).endswith("TorchwrapWarning") for argument in node.args[1:]):
                yield node, "TorchwrapWarning"


def _template(node: ast.expr) -> str:
    """Text of a string expression with `<name>` for each value; empty when it is not a text of its own (a message passed on)."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else _value(part) for part in node.values]
        text = "".join(map(str, parts))
        return "" if re.fullmatch(r"<[^>]*>", text) else text
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    if isinstance(node, ast.IfExp):
        return _template(node.body) or _template(node.orelse)
    return ""


def _value(node: ast.expr) -> str:
    assert isinstance(node, ast.FormattedValue)
    value = node.value
    while isinstance(value, ast.Call) and value.args:  # format_bytes(budget) -> budget
        value = value.args[0]
    words = re.findall(r"[A-Za-z_]\w*", ast.unparse(value))
    return f"<{words[-1].replace('_', ' ') if words else 'value'}>"


def _error(name: str) -> str:
    from torchwrap.core import errors

    cls = getattr(errors, name)
    parents = ", ".join(f"`{base.__name__}`" for base in cls.__mro__[1:] if base not in (object, BaseException, Exception, Warning))
    docstring = (cls.__doc__ or "").strip()
    summary, _, rest = docstring.partition("\n\n")
    lines = [f"*{' '.join(summary.split())}* Caught as {parents or '`Exception`'} too."]
    fields = re.findall(r"^\s{4,}(\w+): (.+)$", rest, re.MULTILINE)
    if fields and name != "TorchwrapError":
        lines += ["", *(f"- `error.{field}`: {text}" for field, text in fields)]
    rows = [message for message in messages() if message.error == name]
    if rows:
        lines += ["", "| message | what it says to do | raised in |", "|---|---|---|"]
        lines += [f"| {_code(row.what)} | {_code(row.fix)} | `{row.file}` |" for row in rows]
    return "\n".join(lines)


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    if not text:
        return ""
    fence = "``" if "`" in text else "`"
    return f"{fence}{' ' if '`' in text else ''}{text}{' ' if '`' in text else ''}{fence}"


def _fields(name: str) -> str:
    module, _, cls_name = name.rpartition(".")
    cls: Any = getattr(importlib.import_module(module), cls_name)
    lines = ["| field | default | unit | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        meaning = str(field.metadata.get("doc", ""))
        if field.metadata.get("choices"):
            meaning += " One of " + ", ".join(f"`{choice!r}`" for choice in field.metadata["choices"]) + "."
        if field.metadata.get("machine"):
            meaning += " Not saved in plans."
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {default} | {field.metadata.get('unit') or ''} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _command(name: str) -> str:
    from torchwrap.cli.__main__ import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main([*name.split("."), "--help"] if name else ["--help"])
    return f"```text\n{text.getvalue().strip()}\n```"


def _changelog(_: str) -> str:
    return (ROOT / "CHANGELOG.md").read_text().partition("\n")[2]


_KINDS: dict[str, Callable[[str], str]] = {"error": _error, "fields": _fields, "command": _command, "changelog": _changelog}
