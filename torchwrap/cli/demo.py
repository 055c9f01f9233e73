"""The main job on a real model: stream SmolLM2-135M-Instruct under 40 % of its memory, compare bit for bit, draw the memory timeline.

Exit status 1 when any check fails.

example: torchwrap demo --model ./my-chat-model --fraction 0.3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchwrap.cli.output import Outcome, table

if TYPE_CHECKING:
    from torchwrap.demo.run import DemoResult

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "stream a real chat model under 40 % of its memory, compare, draw the memory timeline"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="a chat model of your own (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder for the picture (default: demo-out)")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of the answer (default: 48)")
    parser.add_argument("--fraction", type=_fraction, default=0.4, help="memory budget as a fraction of the weights (default: 0.4)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Tell the story while it happens (on standard error with --json), then the figures and checks."""
    from torchwrap.demo.run import run as demonstrate

    shown = sys.stderr if arguments.json else sys.stdout
    result = demonstrate(model=arguments.model, out=arguments.out, shown=shown, tokens=arguments.tokens, fraction=arguments.fraction)
    return Outcome(data=result.to_dict(), text=_text(result), ok=result.ok)


def _text(result: DemoResult) -> str:
    from torchwrap.core.config import format_bytes

    rows: list[tuple[str, str]] = []
    for name, value in result.figures.items():
        if isinstance(value, int) and "byte" in name:
            rows.append((name, format_bytes(value)))
        else:
            rows.append((name, f"{value:.3g}" if isinstance(value, float) else str(value)))
    lines = [table(rows), "", *(f"{name}: {held}" for name, held in result.checks.items())]
    if result.picture:
        lines += ["", f"memory timeline: {result.picture}"]
    return "\n".join(lines)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction in (0, 1]")
    return value
