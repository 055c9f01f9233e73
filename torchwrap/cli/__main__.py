"""`torchwrap COMMAND ...`: parses the arguments, runs one command, prints its outcome once.

Every command lives in its own file with `SUMMARY`, `configure(parser)` and `run(arguments) -> Outcome`; adding one is a line in
`COMMANDS`. Those files import torch and frameworks inside `run`, so that help texts and usage errors appear at once and without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from torchwrap.cli.output import Outcome, render

__all__ = ["COMMANDS", "main"]

COMMANDS = ("demo", "doctor", "plan", "describe", "verify", "bench", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; `None` takes those of the process.

    Returns:
        The exit status: 0 fine, 1 a negative finding or an error while running, 2 a usage error, 130 interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help (0) or the usage error (2)
        return int(stop.code or 0)
    return _run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchwrap",
        description="Run the PyTorch models you already have on hardware that is too small for them.",
        epilog="Exit status: 0 fine, 1 a negative finding or an error, 2 a usage error. Sizes: 6GiB, 500MB, or plain bytes.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"torchwrap.cli.{name}")
        command = commands.add_parser(
            name, help=module.SUMMARY.replace("%", "%%"), description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(command)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
        command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Reads the version from the installed metadata only when asked for it."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and stop")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"torchwrap {version('torchwrap')}")
        parser.exit()


def _run(arguments: argparse.Namespace) -> int:
    from torchwrap.core.errors import ConfigError, TorchwrapError

    try:
        outcome: Outcome = arguments.run(arguments)
        print(render(outcome, as_json=arguments.json))
        sys.stdout.flush()
    except ConfigError as error:
        return _report(error, arguments, status=2)
    except TorchwrapError as error:
        return _report(error, arguments, status=1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torchwrap":
            raise
        return _report(error, arguments, status=1)
    except KeyboardInterrupt:
        print("torchwrap: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) left; Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if outcome.ok else 1


def _report(error: Exception, arguments: argparse.Namespace, *, status: int) -> int:
    if arguments.json:
        record: dict[str, object] = {"class": type(error).__name__, "message": str(error)}
        record |= {key: value for key, value in vars(error).items() if isinstance(value, (str, int))}
        print(json.dumps({"ok": False, "error": record}, indent=2))
    else:
        print(f"torchwrap {arguments.command}: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
