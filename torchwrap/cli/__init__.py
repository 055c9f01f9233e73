"""The command line: one file per command, `__main__.py` dispatches. Nothing in the library imports this package."""

from __future__ import annotations

__all__: list[str] = []
