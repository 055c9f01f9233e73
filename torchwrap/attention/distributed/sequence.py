"""A sequence divided over processes: who has which tokens, whether all processes came with the same, and attention over the whole.

What one process gets wrong (other lengths, a cache, positions of another layout) lets the others wait for ever or, worse, merges what does
not belong together. So before a model's call its processes exchange a few integers, and if one has a reason to refuse, all raise.

Letters: B batch, H heads, T processes, S tokens of the whole sequence, D and Dv widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from torchwrap.attention.autocast import autocast
from torchwrap.attention.dispatch import SHARING
from torchwrap.attention.dispatch import backend as backend_named
from torchwrap.attention.distributed.ring import Layout, ring_attend, shard, unshard
from torchwrap.attention.distributed.ulysses import ulysses_attend
from torchwrap.attention.distributed.works import Group, Outstanding, group_size, resolved
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings, settings_of
from torchwrap.core.errors import ConfigError, UnsupportedModelError

__all__ = ["DividedSequence", "Way"]

Way = Literal["zigzag", "contiguous", "ulysses"]


@dataclass(frozen=True)
class DividedSequence:
    """One model's sequences over a group of processes.

    Attributes:
        group: of processes, or its name; None: the default one.
        way: "zigzag" or "contiguous": keys and values go round a ring, and a process has an early and a late part of the sequence or one
            part in order. "ulysses": heads are exchanged for tokens, parts are in order.
    """

    group: Group = None
    way: Way = "zigzag"

    @property
    def layout(self) -> Layout:
        """Which tokens a process has."""
        return "contiguous" if self.way == "ulysses" else self.way

    @property
    def size(self) -> int:
        """T."""
        return group_size(self.group)[1]

    def part(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This process' part of a whole sequence along `dim`.

        Raises:
            ConfigError: the length cannot be divided evenly, or there is no such group.
        """
        rank, size = group_size(self.group)
        return shard(whole, dim, rank, size, self.layout).contiguous()

    def whole(self, part: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence of which every process gives its part, on every process; gradients stop here.

        Raises:
            WorkError: a process did not come with its part.
        """
        return self.joined(self.parts(part), dim)

    def parts(self, part: Tensor) -> list[Tensor]:
        """What every process gives, in order of their numbers; gradients stop here.

        Raises:
            WorkError: a process did not come with its part.
        """
        return self._gathered(part, "gathering the sequence")

    def joined(self, parts: list[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence of the parts of all processes, in order of their numbers."""
        return unshard(parts, dim, self.layout)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Indices in the whole sequence of this process' tokens: int64 `[tokens]`."""
        return self.part(torch.arange(tokens * self.size, device=device), 0)

    def agree(self, facts: Sequence[int], problem: Exception | None, device: torch.device) -> list[list[int]]:
        """What all processes came with.

        Args:
            facts: of this process; all must give as many.
            problem: why this process cannot go on; then all raise.
            device: where the back end of the group takes tensors.

        Returns:
            The facts of all processes, in order of their numbers.

        Raises:
            Exception: the problem of this process.
            ConfigError: another process has one.
            WorkError: a process did not come.

        Cost: one exchange of a few integers.
        """
        mine = torch.tensor([int(problem is not None), *facts], dtype=torch.int64, device=device)
        rows = [row.tolist() for row in self._gathered(mine, "agreeing on a divided sequence")]
        if problem is not None:
            raise problem
        refusing = [rank for rank, row in enumerate(rows) if row[0]]
        if refusing:
            raise ConfigError(
                f"process {refusing[0]} of the group cannot compute its part of the sequence",
                where="sp_group",
                fix="Its own error says why; every process raises before anything is computed.",
            )
        return [row[1:] for row in rows]

    def _gathered(self, part: Tensor, what: str) -> list[Tensor]:
        group = resolved(self.group)
        part = part.detach().contiguous()
        into = [torch.empty_like(part) for _ in range(self.size)]
        with Outstanding(what, group=group) as works:
            works.start(0, lambda: dist.all_gather(into, part, group=group, async_op=True))
        return into

    def attend(
        self, where: str, q: Tensor, k: Tensor, v: Tensor, *, mask: TileMask | Tensor | None = None, scale: float | None = None,
        softcap: float | None = None, sinks: Tensor | None = None, bias: Tensor | None = None, dropout: float = 0.0,
        backend: str | Settings = "auto",
    ) -> Tensor:  # fmt: skip
        """Attention of this process' queries over the whole sequence.

        Args:
            where: name of the module that asks, for messages.
            q: `[B, Hq, S / T, D]`.
            k: `[B, Hkv, S / T, D]`.
            v: `[B, Hkv, S / T, Dv]`.
            mask: of the whole sequence, `[B | 1, 1, S, S]`, the same on every process; None: everything is visible.
            scale: of the scores.
            softcap: bound of the scaled scores.
            sinks: `[Hq]`, the same on every process.
            bias: refused: it would be one of the whole sequence.
            dropout: refused in a ring, where each weight is computed once by each of two kernels.
            backend: as in `attend`.

        Returns:
            `[B, Hq, S / T, Dv]`.

        Raises:
            UnsupportedModelError: a bias, a mask that is not one of the whole sequence, dropout in a ring; nothing was sent.
            ConfigError: the heads cannot be divided among the processes.
            WorkError: an exchange failed or did not end in time; the message names its step.
        """
        if torch.compiler.is_compiling():
            from torchwrap.attention.untraced import untraced  # slow

            options = {"mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks, "bias": bias, "dropout": dropout}
            # What a process waits for in here it waits for in Python: a graph would have to be broken anyway.
            out: Tensor = untraced(self.attend, where, q, k, v, backend=backend, **options)
            return out
        self._check(where, q, k, mask, bias, dropout)
        assert mask is None or isinstance(mask, TileMask)
        q, k, v = autocast(q, k, v)
        if self.way == "ulysses":
            return ulysses_attend(
                q, k, v, mask=mask, sinks=sinks, group=self.group, scale=scale, softcap=softcap, dropout=dropout, backend=backend,
                agreed=True,
            )  # fmt: skip
        name = settings_of(backend).backend
        out, _ = ring_attend(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks, layout=self.layout, group=self.group,
            using=None if name == "auto" else backend_named(name), agreed=True,
        )  # fmt: skip
        return out

    def check_backend(self, name: str) -> None:
        """Can this back end compute parts of attention that are merged?

        Raises:
            ConfigError: it cannot.
        """
        if self.way != "ulysses" and name not in ("auto", *SHARING):
            raise ConfigError(
                f"backend={name!r} cannot compute a part of attention whose gradient is one of the whole",
                where="FastAttention.backend",
                fix=f'Use "auto", {", ".join(map(repr, SHARING))}, or ring="ulysses", which attends whole sequences.',
            )

    def _check(self, where: str, q: Tensor, k: Tensor, mask: TileMask | Tensor | None, bias: Tensor | None, dropout: float) -> None:
        tokens = q.shape[2] * self.size
        reason = None
        if bias is not None:
            reason = "it adds a bias to the scores, of its own tokens only"
        elif mask is not None and (not isinstance(mask, TileMask) or tuple(mask.shape[2:]) != (tokens, tokens)):
            reason = f"its mask is {list(mask.shape)}, not of the whole sequence of {tokens} tokens"
        elif k.shape[2] != q.shape[2]:
            reason = f"it has {q.shape[2]} queries and {k.shape[2]} keys"
        elif dropout and self.way != "ulysses":
            reason = "it drops weights of attention, which the steps of a ring would drop differently forward and backward"
        if reason is not None:
            raise UnsupportedModelError(
                f"attention over a divided sequence is not possible here: {reason}",
                where=where,
                fix="Set attention_dropout to 0." if dropout else "Unwrap the model, or wrap it without sp_group.",
            )
