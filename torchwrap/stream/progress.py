"""A progress bar for work that takes seconds, where somebody is looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["progress"]

T = TypeVar("T")
_SHOWN_FROM = 256 << 20  # bytes; what moves less is over before a bar is read


def progress(items: Sequence[T], title: str, nbytes: Callable[[T], int]) -> Iterator[T]:
    """Yield the items, with a bar in bytes on a terminal if tqdm is installed and there is enough to do."""
    total = sum(nbytes(item) for item in items)
    bar = None
    if total >= _SHOWN_FROM and sys.stderr.isatty():
        try:
            from tqdm import tqdm  # optional: nothing depends on it
        except ImportError:
            pass
        else:
            bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
    try:
        for item in items:
            yield item
            if bar is not None:
                bar.update(nbytes(item))
    finally:
        if bar is not None:
            bar.close()
