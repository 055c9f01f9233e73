"""Fails when less than 95 % of the public names have complete types, as a user's type checker sees them.

basedpyright's `--verifytypes` judges an installed package by the rules for typed libraries; names that come from other packages
(`--ignoreexternal`) are not ours to complete.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NEEDED = 0.95


def main() -> int:
    """Exit status 0 when the share of completely typed public names is at least `NEEDED`."""
    checker = Path(sys.executable).with_name("basedpyright")
    command = [str(checker), "--verifytypes", "torchwrap", "--ignoreexternal", "--outputjson"]
    # The checker cannot follow the import hook of an editable install, a plain path it can; and it looks for torch beside the first
    # `python` on PATH, whatever --pythonpath says (basedpyright 1.40).
    path = f"{checker.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PATH": path}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
    try:
        report = json.loads(output)["typeCompleteness"]
    except (json.JSONDecodeError, KeyError):
        print(f"public types: the checker gave no report: {output[:2000]}")
        return 1
    score = report["completenessScore"]
    counts = report["exportedSymbolCounts"]
    print(f"public types: {score:.1%} complete, needed {NEEDED:.0%} {counts}")
    if score >= NEEDED:
        return 0
    for symbol in report["symbols"]:
        if (symbol["isExported"] and not symbol["isTypeKnown"]) or symbol.get("isTypeAmbiguous"):
            messages = "; ".join(found["message"].splitlines()[0] for found in symbol["diagnostics"])
            print(f"  {symbol['name']}: {messages}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
