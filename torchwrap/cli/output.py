"""What every command returns, and the few ways in which commands print.

A command never prints its result: it returns an `Outcome` that holds the same facts twice, as a record (`--json`) and as text for a
person, so that the two cannot drift apart. The exit status follows from it: 0 fine, 1 a negative finding, 2 a usage error (argparse).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Outcome", "existing_folder", "positive", "render", "size", "table"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one command.

    Args:
        data: the facts, JSON-able.
        text: the same facts for a person.
        ok: False for a negative finding (exit status 1).
    """

    data: dict[str, object] = field(default_factory=dict)
    text: str = ""
    ok: bool = True


def render(outcome: Outcome, *, as_json: bool) -> str:
    """The one string a command prints on standard output."""
    if as_json:
        return json.dumps({"ok": outcome.ok, **outcome.data}, indent=2, default=str)
    return outcome.text


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Rows as aligned columns; numbers to the right, everything else to the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    body = ([list(headers)] if headers else []) + cells
    if not body:
        return ""
    widths = [max(len(row[column]) for row in body if column < len(row)) for column in range(max(map(len, body)))]
    numeric = [all(_is_number(row[column]) for row in cells if column < len(row)) for column in range(len(widths))]
    lines = []
    for row in body:
        padded = [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=False)]
        lines.append("  ".join(padded).rstrip())
    if headers:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    head = cell.split(" ")[0].rstrip("x%")
    return bool(head) and (head.replace(".", "", 1).replace(",", "").lstrip("-").isdigit() or head in ("-", "nan"))


def size(text: str) -> int:
    """argparse type for a number of bytes: `6GiB`, `500MB`, `1073741824`; anything else is a usage error naming the units."""
    from torchwrap.core.config import parse_size  # imported here: `--help` must not load torch
    from torchwrap.core.errors import ConfigError

    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def existing_folder(text: str) -> Path:
    """argparse type for a folder that is there."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
