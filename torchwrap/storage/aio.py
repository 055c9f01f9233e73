"""Reading weights in the background at the speed of the disk: a few threads, large requests, straight into the memory that is used.

A `Reader` cuts each `Read` into requests of `chunk` bytes (see request.py), which its threads take in order of submission: earlier
tickets finish first, and one ticket uses all threads. Checksums are taken from each request just read, while its bytes are still in the
processor's cache. `probe` finds out how fast a file can be read, and with how many threads.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from torchwrap.core.errors import ConfigError, StorageError, TorchwrapWarning
from torchwrap.storage.backend import Backend, Source, Stats
from torchwrap.storage.checksum import Part, crc32, sum64
from torchwrap.storage.pool import BLOCK, allocate, round_down, round_up
from torchwrap.storage.request import Read, cut
from torchwrap.storage.ringpool import RingPool
from torchwrap.storage.safefile import TensorFile
from torchwrap.storage.uring import unavailable_reason
from torchwrap.storage.workers import Mode, Pool, Ticket

if TYPE_CHECKING:
    from torchwrap.storage.spillfile import SpillFile

__all__ = ["Backend", "Mode", "Part", "Probe", "Read", "Reader", "Source", "Stats", "Ticket", "crc32", "probe", "sum64"]


class Reader:
    """A few threads that read for you.

    Args:
        threads: requests under way at the same time.
        chunk: bytes of one request.
        timeout_s: what `Ticket.wait` uses when not told.
        backend: the system calls; replaced in tests.
        mode: "auto" reads past the page cache and falls back to ordinary reads with one warning; "direct" raises instead; "buffered"
            never tries, and drops what it read from the page cache; "uring" is as "auto", with io_uring and one thread in place of
            `threads` threads.
        background: its threads yield to computing ones, see priority.py; for what nothing waits for at once.

    Raises:
        ConfigError: mode is "uring", and there is no io_uring on this machine or it is forbidden.

    Cost: nothing until the first `submit`; then `threads` idle threads, and a buffer of `chunk` bytes for each that had to copy.

    Example:
        >>> import torch, tempfile, pathlib, safetensors.torch
        >>> from torchwrap.storage.aio import Read, Reader
        >>> from torchwrap.storage.pool import allocate
        >>> from torchwrap.storage.safefile import TensorFile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name, "model.safetensors")
        >>> safetensors.torch.save_file({"weight": torch.arange(6.0)}, path)
        >>> with Reader() as reader, TensorFile.open(path) as file:
        ...     segment, buffer = file.segments["weight"], allocate(8192)
        ...     start = segment.offset % 4096
        ...     reader.submit([Read(file, segment.offset, segment.nbytes, buffer, start)]).wait()
        ...     buffer.tensor()[start : start + segment.nbytes].view(segment.dtype)
        tensor([0., 1., 2., 3., 4., 5.])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        threads: int = 2,
        chunk: int = 4 << 20,
        timeout_s: float = 60.0,
        backend: Backend | None = None,
        *,
        mode: Mode = "auto",
        background: bool = False,
    ) -> None:
        if threads < 1 or chunk < BLOCK or timeout_s <= 0 or mode not in get_args(Mode):
            raise ValueError(f"threads={threads}, chunk={chunk}, timeout_s={timeout_s}, mode={mode!r} is no way to read")
        if mode == "uring" and (reason := unavailable_reason()):
            raise ConfigError(
                f"io_uring cannot be used here: {reason}", where="io_backend", fix='Use io_backend="auto", which never needs it.'
            )
        self.threads: int = threads
        self.chunk: int = round_up(chunk)
        self.timeout_s: float = timeout_s
        self.mode: Mode = mode
        self.background: bool = background
        self.backend: Backend = backend or Backend()
        self.stats: Stats = Stats()
        self._pool: Pool | None = None
        self._closed = False

    def submit(self, reads: Sequence[Read]) -> Ticket:
        """Start reading; returns at once.

        Raises:
            ValueError: a range does not fit its target, or a part is not inside its read.
            StorageError: the reader is closed, mode is "direct" and a file system refuses it, or no ring could be made.
        """
        if self._closed:
            raise StorageError("this reader was closed", fix="Make a new Reader.")
        pieces = [piece for read in reads for piece in cut(read, self.chunk)]
        for file in {id(read.file): read.file for read in reads}.values():
            self._try_direct(file)
        return self._live().put(reads, pieces)

    def close(self, timeout_s: float = 5.0) -> None:
        """Finish the requests under way, fail those not begun (their `wait` raises `StorageError`) and end the threads.

        Never hangs: a thread that is stuck in the disk for longer than `timeout_s`, or than the reader's own if that is less, is left
        behind; it keeps its target memory alive.
        """
        self._closed = True
        if self._pool is not None:
            self._pool.stop(min(timeout_s, self.timeout_s))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Threads, queue and figures stay in the process that made them; a copy starts its own threads when first used.
        return {name: value for name, value in self.__dict__.items() if name not in ("_pool", "stats")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pool=None, stats=Stats())

    def _live(self) -> Pool:
        """The threads of this process: a forked child has none of its parent's, and never touches their locks."""
        if self._pool is None or self._pool.pid != os.getpid():
            kind = RingPool if self.mode == "uring" else Pool
            self._pool = kind(self.threads, self.chunk, self.timeout_s, self.backend, self.mode, self.stats, self.background)
            weakref.finalize(self, Pool.stop, self._pool, 1.0)
        return self._pool

    def _try_direct(self, file: Source) -> None:
        """Open the file past the page cache here, where a refusal can be reported at the caller's line."""
        if self.mode == "buffered" or str(file.path) in self.stats.refused:
            return
        try:
            file.fd(True)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            if self.mode == "direct":
                raise StorageError(
                    f"the file system refuses O_DIRECT: {error.strerror}", where=str(file.path), fix='Use io_backend="auto".'
                ) from error
            self.stats.refused.add(str(file.path))


@dataclass(frozen=True, slots=True)
class Probe:
    """The best way found to read a file.

    Attributes:
        bytes_per_s: rate reached.
        threads: requests under way at the same time.
        chunk: bytes of one request.
        direct: past the page cache; if false the rate may be that of memory.
    """

    bytes_per_s: float
    threads: int
    chunk: int
    direct: bool


def probe(file: TensorFile | SpillFile, seconds: float = 0.3) -> Probe:
    """Measure how fast a file can be read, with three combinations of threads and request size.

    Cost: about `seconds`, and 64 MiB of memory while it runs.
    """
    window = min(round_up(file.nbytes), 64 << 20)
    buffer, best = allocate(window), None
    try:
        for threads, chunk in ((2, 4 << 20), (2, 16 << 20), (4, 4 << 20)):
            with Reader(threads, chunk) as reader, warnings.catch_warnings():
                warnings.simplefilter("ignore", TorchwrapWarning)  # the reader that does the work will say it
                begin, position = time.monotonic(), 0
                while (elapsed := time.monotonic() - begin) < seconds / 3 or not reader.stats.bytes:
                    offset = position % max(BLOCK, round_down(file.nbytes - window + BLOCK))
                    reader.submit([Read(file, offset, min(window, file.nbytes - offset), buffer)]).wait()
                    position += window
                elapsed = time.monotonic() - begin
                found = Probe(reader.stats.bytes / max(elapsed, 1e-9), threads, chunk, not reader.stats.refused)
                best = found if best is None or found.bytes_per_s > best.bytes_per_s else best
    finally:
        buffer.free()
    assert best is not None
    return best
