"""A process group of one process, for what only has to exist and not to communicate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["one_process_group"]


@contextmanager
def one_process_group() -> Iterator[None]:
    """A gloo group of this process alone, gone on exit."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
