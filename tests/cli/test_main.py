"""Exit statuses, JSON on every command, and help that needs nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done
from torchwrap.cli.__main__ import COMMANDS

ARGUMENTS = {"demo": [], "doctor": [], "plan": ["."], "describe": ["."], "verify": ["."], "bench": ["."], "tune": []}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command_exits_with_zero(cli: Callable[..., Done], command: str) -> None:
    done = cli(command, "--help")
    assert done.status == 0
    assert "--json" in done.out


def test_help_lists_every_command(cli: Callable[..., Done]) -> None:
    done = cli("--help")
    assert done.status == 0
    assert all(f"\n    {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["dance"], id="unknown-command"),
        pytest.param(["plan", "/nowhere/at/all"], id="no-such-folder"),
        pytest.param(["plan", ".", "--device-memory", "6 gigs"], id="bad-unit"),
        pytest.param(["plan", ".", "--budget", "gpu=6GiB"], id="unknown-tier"),
        pytest.param(["plan", ".", "--budget", "device"], id="tier-without-size"),
        pytest.param(["bench", ".", "--against", "nobody"], id="unknown-rival"),
        pytest.param(["bench", ".", "--rounds", "0"], id="no-rounds"),
        pytest.param(["demo", "--fraction", "1.5"], id="fraction-above-one"),
    ],
)
def test_usage_error_exits_with_two(cli: Callable[..., Done], arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.status == 2
    assert "usage: torchwrap" in done.err
    assert done.out == ""


def test_bad_unit_shows_the_accepted_ones(cli: Callable[..., Done]) -> None:
    assert "GiB" in cli("doctor", "--bytes", "6 gigs").err


def test_version_is_that_of_the_package(cli: Callable[..., Done]) -> None:
    from importlib.metadata import version

    done = cli("--version")
    assert (done.status, done.out.strip()) == (0, f"torchwrap {version('torchwrap')}")


def test_error_of_the_library_is_one_line_or_one_json_object(cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("plan", tmp_path, "--json")
    assert done.status == 1
    assert done.data["ok"] is False
    assert done.data["error"]["class"] == "UnsupportedModelError"
    plain = cli("plan", tmp_path)
    assert plain.status == 1
    assert plain.err.startswith("torchwrap plan: ")
    assert "Traceback" not in plain.err


def test_pipe_closed_by_reader_is_no_traceback(pristine: Path) -> None:
    command = f"{sys.executable} -m torchwrap.cli.__main__ describe {pristine} --tensors --json | head -n 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
