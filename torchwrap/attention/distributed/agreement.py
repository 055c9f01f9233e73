"""Whether all processes of a group came with the same call, compared before anything of it is sent.

What differs is seen nowhere later: a gloo process that receives more than it has room for is aborted, and with another mask or scale each
process computes correctly what nobody asked for. Masks are compared by what they say of each token, not by the tensors that say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from torchwrap.attention.distributed.works import Group, Outstanding, resolved
from torchwrap.attention.masks.fields import TENSOR_FIELDS
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

__all__ = ["compare", "fingerprint", "same_everywhere"]


def same_everywhere(
    what: str, q: Tensor, k: Tensor, v: Tensor, group: Group, *, also: Mapping[str, object], timeout_s: float | None = None
) -> None:  # fmt: skip
    """Compare one call of attention over the group.

    Args:
        what: the operation, for messages.
        q: `[B, Hq, S, D]`.
        k: `[B, Hkv, S, D]`.
        v: `[B, Hkv, S, Dv]`.
        group: of processes.
        also: whatever else has to be the same, by its name: masks by their `fingerprint`, tensors by their bytes, all else by its repr.
        timeout_s: longest wait in seconds; None: what the process group allows.

    Raises:
        ConfigError: in every process, if one came with something else; the group stays in step.
        WorkError: a process did not come.

    Cost: one exchange of a few integers, and reading what the mask holds.
    """
    sizes = f"q {list(q.shape)} {q.dtype}, k and v of {k.shape[1]} heads and {v.shape[3]} elements"
    facts = {name: _said(value, q.shape[0]) for name, value in also.items()}
    compare(what, {"size or dtype": sizes, **facts}, group, q.device, timeout_s=timeout_s)


def compare(what: str, facts: Mapping[str, object], group: Group, device: torch.device, *, timeout_s: float | None = None) -> None:
    """Compare facts, by their repr, over the group.

    Raises:
        ConfigError: in every process, if they are not the same in all; the group stays in step.
        WorkError: a process did not come.
    """
    found = resolved(group)
    mine = torch.tensor([_number(value) for value in facts.values()], device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(found))]
    with Outstanding(f"agreeing on {what}", group=found, timeout_s=timeout_s) as works:
        works.start(0, lambda: dist.all_gather(rows, mine, group=found, async_op=True))
    first = rows[0].tolist()
    for rank, row in enumerate(rows):
        for (name, value), here, there in zip(facts.items(), row.tolist(), first, strict=True):
            if here != there:
                raise errors.ConfigError(
                    f"process {rank} came with another {name} than process 0; process {dist.get_rank(found)}, this one, has {value}",
                    where=what,
                    fix="Call it in every process with the same mask and settings, and with as many tokens of the same heads and dtype.",
                )


def fingerprint(mask: TileMask, batch: int) -> str | None:
    """What a mask says of a batch, as a short word: equal for masks that were made in the same way; None where it hides nothing.

    A mask of one row and the same one of all rows are equal, and so are no padding and padding of no token.
    """
    said: list[object] = []
    for name in TENSOR_FIELDS:
        values = getattr(mask, name)
        if values is not None and not _hides_nothing(name, values, mask.shape[3]):
            said.append((name, _digest(values.expand(batch, *values.shape[1:]))))
    if mask.dictionary is not None:
        said.append((mask.dictionary.start, mask.dictionary.block, _digest(mask.dictionary.codes), _digest(mask.dictionary.tiles)))
    band = (mask.right, mask.left, mask.chunk)
    if band != (None, None, None):
        said.append((band, mask.first_query(), mask.kv_offset))
    return blake2b(repr(said).encode(), digest_size=8).hexdigest() if said else None


def _hides_nothing(name: str, values: Tensor, keys: int) -> bool:
    if name == "kv_start":
        return bool((values <= 0).all())
    if name == "kv_end":
        return bool((values >= keys).all())
    return name == "key_mask" and bool(values.all())


def _said(value: object, batch: int) -> object:
    if isinstance(value, TileMask):
        return fingerprint(value, batch)
    return (list(value.shape), _digest(value)) if isinstance(value, Tensor) else value


def _digest(tensor: Tensor) -> str:
    return blake2b(tensor.detach().flatten().view(torch.uint8).cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _number(value: object) -> int:
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
