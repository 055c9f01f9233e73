"""Settings of `fast_attention`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch

from torchwrap.attention.cooperative.planner import RECENT
from torchwrap.attention.cooperative.settings import CacheSettings
from torchwrap.attention.dispatch import BACKENDS
from torchwrap.attention.distributed.works import group_name
from torchwrap.attention.settings import Settings
from torchwrap.core.config import Config, option
from torchwrap.core.errors import ConfigError

__all__ = ["FastAttention"]


@dataclass(frozen=True, kw_only=True)
class FastAttention(Config):
    """Lead a model's attention through `torchwrap.attention`.

    Attributes:
        backend: which way of computing attention; a named one that cannot run a call raises.
        tune: what the choice of a back end goes by.
        tune_dir: folder of what was measured.
        deterministic: gradients are the same bits in every run.
        block_m: rows of a tile.
        block_n: columns of a tile.
        num_warps: warps of a program.
        num_stages: tiles in flight.
        fallback: what to do when a call must go to the model's own attention, because it asks for something no back end returns.
        cache: `arena` lets growing caches write in place, `cooperative` lets `generate` keep part of them on the host, `keep` leaves them.
        kv_host: how much of a cooperative cache lies on the host.
        kv_split: how a cooperative cache is divided.
        kv_host_dtype: in which the host stores its part; a narrower one than the model's loses something, which is measured.
        kv_disk: most bytes of a cooperative cache on a disk.
        kv_disk_path: where that is.
        kv_recent: most recent tokens that stay on the device.
        stream_chunk_mib: one of the two buffers for what comes from the host.
        host_threads: threads that attend on the host.
        prefill_chunk: tokens of a prompt to process at a time.
        tp_group: processes that divide the heads among them.
        allreduce_blocks: into how many blocks the rows are cut whose sums over these processes run while the next are computed.
        sp_group: processes that divide the sequence among them.
        ring: who has which tokens, and what travels.
    """

    technique: ClassVar[str] = "fast_attention"
    OF_A_CACHE: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(CacheSettings))
    """Fields that say something about cooperative caches only."""
    OF_A_MODEL: ClassVar[tuple[str, ...]] = ("cache", *OF_A_CACHE, "tp_group", "allreduce_blocks", "sp_group", "ring")
    """Fields that say something about a model only, and nothing about single calls."""

    backend: str = option(
        "auto", choices=("auto", *BACKENDS), doc="Which way of computing attention; a named one that cannot run a call raises."
    )
    tune: str = option(
        "table", choices=("table", "measure", "off"),
        doc="What `auto` goes by: the shipped order, corrected by what was measured on this machine before (`table`); the same, and a kind "
        "of call that was never measured is measured when it first comes (`measure`); the shipped order alone (`off`).",
    )  # fmt: skip
    tune_dir: str | None = option(
        None, machine=True, doc="Folder of the measurements; none: `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`, in it `attention`."
    )
    deterministic: bool = option(False, doc="Take no back end whose gradients may differ in their last bits from run to run.")
    block_m: int | None = option(
        None, low=16, high=256,
        doc="Rows of a tile, a power of two, with `backend='triton'`: taken as it is, or refused with the bytes it needs.",
    )  # fmt: skip
    block_n: int | None = option(None, low=16, high=256, doc="Columns of a tile, as `block_m`.")
    num_warps: int | None = option(None, low=1, high=32, doc="Warps of a program, a power of two, as `block_m`.")
    num_stages: int | None = option(None, low=1, high=8, doc="Tiles of the inner loop in flight, as `block_m`.")
    fallback: str = option(
        "warn", choices=("warn", "error", "silent"),
        doc="When a call must go to the model's own attention (it asks for attention's weights): warn once per reason, raise, or neither.",
    )  # fmt: skip
    cache: str = option(
        "arena", choices=("arena", "cooperative", "keep"),
        doc="`arena` lets a model's growing caches write new tokens in place instead of copying all tokens for each one; `cooperative` "
        "also gives `generate` a cache of which part lies on the host, attended there, where the caller passes none.",
    )  # fmt: skip
    kv_host: float | int | str | None = option(
        "auto",
        doc="How much of a cooperative cache lies on the host: what the device has no memory for or what is predicted to be faster there "
        "(`auto`), a share of all in [0.0, 1.0] (a float), bytes or a size such as `2 GiB`; none: nothing.",
    )  # fmt: skip
    kv_split: str = option(
        "auto", choices=("auto", "token", "layer", "upload", "head"),
        doc="How a cooperative cache is divided: every layer by tokens, whole layers, storage on the host only, or the fastest of these by "
        "prediction; or every layer by key heads.",
    )  # fmt: skip
    kv_host_dtype: torch.dtype | None = option(  # noqa: RUF009  # a dtype is immutable, which ruff knows of builtins only
        None,
        doc="In which dtype the host stores its part of a cooperative cache; none: the model's, nothing is lost. What a narrower one loses "
        "is measured, and `explain()` has the bound.",
    )  # fmt: skip
    kv_disk: int | str | None = option(
        None,
        doc="Most bytes, or a size like `20 GiB`, of a cooperative cache on a disk, where neither side has memory for it; none: nothing.",
    )  # fmt: skip
    kv_disk_path: str | None = option(
        None, machine=True,
        doc="Where the private folder for `kv_disk` is made; none: where the system keeps temporary files. It is gone with the cache.",
    )  # fmt: skip
    kv_recent: int = option(RECENT, low=0, unit="tokens", doc="The most recent tokens, which stay on the device, in a cooperative cache.")
    stream_chunk_mib: float = option(
        8.0, low=1 / 1024, unit="MiB", doc="One of the two buffers on the device for what comes from the host, in a cooperative cache."
    )
    host_threads: int | None = option(
        None, low=1, machine=True, doc="Threads that attend on the host, in a cooperative cache; none: one for each core, less one."
    )
    prefill_chunk: int | Literal["auto"] = option(
        "auto", low=1, unit="tokens",
        doc="Tokens of a prompt that `generate` processes at a time where part of it lies on the host; `auto`: as many as hide the link.",
    )  # fmt: skip
    tp_group: object = option(
        None, machine=True,
        doc="Process group (or its name) over which a tensor-parallel model's output projections are summed; none: that of its own mesh.",
    )  # fmt: skip
    allreduce_blocks: int | Literal["auto"] = option(
        "auto", low=1,
        doc="Into how many blocks of rows a tensor-parallel model's attention is cut, each summed over the processes while the next is "
        "computed; 1 leaves the model's own order, `auto` measures.",
    )  # fmt: skip
    sp_group: object = option(
        None, machine=True, doc="Process group (or its name) whose processes each have a part of every sequence; none: whole sequences."
    )
    ring: str = option(
        "zigzag", choices=("zigzag", "contiguous", "ulysses"), machine=True,
        doc="Which tokens a process of `sp_group` has, and what travels: keys and values round a ring, with an early and a late part of "
        "the sequence for each process or one part in order; or heads for tokens (`ulysses`), parts in order.",
    )  # fmt: skip

    def validate(self) -> None:
        """Groups are kept by name and sizes as bytes, so that settings stay values that can be compared, copied and stored."""
        for name in ("tp_group", "sp_group"):
            object.__setattr__(self, name, group_name(getattr(self, name), where=f"FastAttention.{name}"))
        settings = self.cache_settings()
        object.__setattr__(self, "kv_host", settings.kv_host)
        object.__setattr__(self, "kv_disk", settings.kv_disk)
        self.settings()
        if self.backend != "auto":
            self._without_effect(("tune", "tune_dir"), 'it is about the choice of a back end. Use backend="auto", or leave it out.')
        if self.tune == "off":
            self._without_effect(("tune_dir",), 'nothing is read there with tune="off". Leave one of them out.')
        if self.cache != "cooperative":
            self._without_effect(self.OF_A_CACHE, 'only a cache on two sides has it. Use cache="cooperative", or leave it out.')
        if self.sp_group is None:
            self._without_effect(("ring",), "it says how sequences are divided over sp_group. Give that, or leave it out.")
        else:
            if self.cache == "cooperative":
                raise ConfigError(
                    'cache="cooperative" and sp_group: nothing is generated from a part of every sequence', where="FastAttention.cache",
                    fix="Leave one of them out.",
                )  # fmt: skip
            said = "sums are not tiled where sequences are divided. Leave it out."
            self._without_effect(("tp_group", "allreduce_blocks"), said)

    def settings(self) -> Settings:
        """What is said about the computation of every call."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings) if field.init})

    def cache_settings(self) -> CacheSettings:
        """What is said about cooperative caches."""
        return CacheSettings(**{name: getattr(self, name) for name in self.OF_A_CACHE})

    def said(self, names: Iterable[str]) -> list[str]:
        """Those of these fields that were given another value than their default."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _without_effect(self, names: Iterable[str], why: str) -> None:
        for name in self.said(names):
            raise ConfigError(
                f"{name}={getattr(self, name)!r} would have no effect", where=f"FastAttention.{name}", fix=why[0].upper() + why[1:]
            )
