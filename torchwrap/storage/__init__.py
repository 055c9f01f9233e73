"""Files and memory for weights that do not fit: everything in this library that writes to a disk, or reads from one in bulk.

`safefile` uses a model's own safetensors files in place, `spill` holds what has no file, `aio` reads both past the page cache into the
aligned memory of `pool`, by threads (`workers`) or io_uring (`ringpool`, `uring`), `atomic` replaces files without a moment of danger,
`limits` tells how much memory there is. Nothing here knows about models; it builds on `torchwrap.core.errors` alone.
"""

from __future__ import annotations

from torchwrap.storage.aio import Backend, Part, Probe, Read, Reader, Stats, Ticket, crc32, probe, sum64
from torchwrap.storage.atomic import Lock, atomic_write, atomic_writer, private_folder, safe_join
from torchwrap.storage.limits import memory_available, memory_limit, memory_usage
from torchwrap.storage.pool import Buffer, allocate
from torchwrap.storage.safefile import Segment, TensorFile, index_folder
from torchwrap.storage.spill import SpillFile, SpillStore

__all__ = [
    "Backend",
    "Buffer",
    "Lock",
    "Part",
    "Probe",
    "Read",
    "Reader",
    "Segment",
    "SpillFile",
    "SpillStore",
    "Stats",
    "TensorFile",
    "Ticket",
    "allocate",
    "atomic_write",
    "atomic_writer",
    "crc32",
    "index_folder",
    "memory_available",
    "memory_limit",
    "memory_usage",
    "private_folder",
    "probe",
    "safe_join",
    "sum64",
]
