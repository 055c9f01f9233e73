"""The demonstration behind `make demo` and `torchwrap demo`: the main job on a real model, checked and drawn."""

from __future__ import annotations

__all__: list[str] = []
