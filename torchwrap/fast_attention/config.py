"""Settings of `fast_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torchwrap.attention.dispatch import BACKENDS
from torchwrap.attention.distributed.works import group_name
from torchwrap.core.config import Config, option

__all__ = ["FastAttention"]


@dataclass(frozen=True, kw_only=True)
class FastAttention(Config):
    """Lead a model's attention through `torchwrap.attention`.

    Attributes:
        backend: which way of computing attention; a named one that cannot run a call raises.
        fallback: what to do when a call must go to the model's own attention, because it asks for something no back end returns.
        cache: `arena` lets growing caches write in place, `keep` leaves them as they are.
        tp_group: processes that divide the heads among them.
        allreduce_blocks: into how many blocks the rows are cut whose sums over these processes run while the next are computed.
        sp_group: processes that divide the sequence among them.
        ring: who has which tokens, and what travels.
    """

    technique: ClassVar[str] = "fast_attention"

    backend: str = option(
        "auto", choices=("auto", *BACKENDS), doc="Which way of computing attention; a named one that cannot run a call raises."
    )
    fallback: str = option(
        "warn", choices=("warn", "error", "silent"),
        doc="When a call must go to the model's own attention (it asks for attention's weights): warn once per reason, raise, or neither.",
    )  # fmt: skip
    cache: str = option(
        "arena", choices=("arena", "keep"),
        doc="`arena` lets a model's growing caches write new tokens in place instead of copying all tokens for each one.",
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
        "zigzag", choices=("zigzag", "contiguous", "ulysses"),
        doc="Which tokens a process of `sp_group` has, and what travels: keys and values round a ring, with an early and a late part of "
        "the sequence for each process or one part in order; or heads for tokens (`ulysses`), parts in order.",
    )  # fmt: skip

    def validate(self) -> None:
        """Groups are kept by name, so that settings stay values that can be compared, copied and stored."""
        for name in ("tp_group", "sp_group"):
            object.__setattr__(self, name, group_name(getattr(self, name), where=f"FastAttention.{name}"))
