"""The page of figures names every bar that the results it rests on miss, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missed_in(page: str) -> set[tuple[str, str, str]]:
    """(machine, run, metric) of what the newest results of each machine miss, by the files that the page names."""
    newest: dict[tuple[str, str], list[dict[str, str]]] = {}
    for machine, files in re.findall(r"^\| (\w+) \|.*\| (`2-cores-.*) \|$", page, re.MULTILINE):
        for file in sorted(re.findall(r"`([^`]+)`", files), key=lambda name: name[-len("2026-11-22") :]):
            for title, summary in json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text())["runs"].items():
                newest[machine, title] = summary["verdicts"]
    assert newest
    return {(machine, title, bar["metric"]) for (machine, title), verdicts in newest.items() for bar in verdicts if not bar["met"]}


def test_page_of_figures_names_every_bar_that_is_missed() -> None:
    page = (ROOT / "docs" / "figures.md").read_text()
    section = page.partition("{ #missed }")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)`.*\| (\w+) \|$", section, re.MULTILINE)
    assert {(machine, title, metric) for title, metric, machine in rows} == missed_in(page)
