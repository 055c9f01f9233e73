"""What a user decides about a cache on two sides, for those who make one on the user's behalf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from torchwrap.attention.cooperative.planner import RECENT, Split
from torchwrap.core import errors
from torchwrap.core.config import parse_size

__all__ = ["CacheSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """How keys and values are divided between a device and its host; names and meanings are those of the settings of `fast_attention`.

    Attributes:
        kv_host: how much lies on the host: "auto", a share in [0.0, 1.0] (a float), bytes or a size like "2 GiB", or None: nothing.
        kv_split: "token", "layer", "upload", "head", or "auto" for the fastest of the first three by prediction.
        kv_host_dtype: in which the host stores keys and values, of no more bytes than the device's; None: as the device.
        kv_disk: most bytes, or a size, on a disk, for what neither side has memory for; None: nothing.
        kv_disk_path: where to make a private folder for that; None: the system's for temporary files.
        kv_recent: most recent tokens that stay on the device.
        stream_chunk_mib: one of the two buffers on the device for what comes from the host, in MiB.
        host_threads: threads that attend on the host; None: one for each core, less one.
        prefill_chunk: tokens of a prompt to process at a time, or "auto".

    Raises:
        ConfigError: `kv_host` or `kv_disk` is none of these.
    """

    kv_host: float | int | str | None = "auto"
    kv_split: Split | Literal["auto"] = "auto"
    kv_host_dtype: torch.dtype | None = None
    kv_disk: int | str | None = None
    kv_disk_path: str | None = None
    kv_recent: int = RECENT
    stream_chunk_mib: float = 8.0
    host_threads: int | None = None
    prefill_chunk: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.kv_disk is not None:
            object.__setattr__(self, "kv_disk", parse_size(self.kv_disk, field="kv_disk"))
        if self.kv_host_dtype is not None and not self.kv_host_dtype.is_floating_point:
            raise errors.ConfigError(
                f"kv_host_dtype is {self.kv_host_dtype}", where="kv_host_dtype", fix="Give a floating dtype, such as torch.bfloat16."
            )
        given: Any = self.kv_host
        if given is None or given == "auto":
            return
        if isinstance(given, float):
            if not 0 <= given <= 1:
                raise errors.ConfigError(
                    f"kv_host is {given}", where="kv_host", fix="Give a share in [0.0, 1.0], bytes as an int, or a size."
                )
        else:
            object.__setattr__(self, "kv_host", parse_size(given, field="kv_host"))
