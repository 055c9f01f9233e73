"""Random calls of `decode`, and the law by which a result is judged."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torchwrap import native


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; every field has the plainest value as default."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    rows: int = 4
    keys: int = 300
    width: int = 64
    value_width: int = 64
    ranges: bool = False
    limits: bool = False
    softcap: float | None = None
    seed: int = 0

    def tensors(self) -> dict[str, Tensor | float | None]:
        """Arguments of the call. Keys are strided as a cache of shape (batch, keys, heads, width) is."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

        rows, some, most = (self.batch, self.rows), self.keys // 2 + 1, self.keys + 9
        return {
            "q": normal(self.batch, self.heads, self.rows, self.width),
            "k": normal(self.batch, self.keys, self.heads, self.width).transpose(1, 2),
            "v": normal(self.batch, self.heads, self.keys, self.value_width),
            "first": whole(-3, some, self.batch) if self.ranges else None,
            "end": whole(0, most, self.batch) if self.ranges else None,
            "limits": torch.stack([whole(-2, some, *rows), whole(0, most, *rows)], -1) if self.limits else None,
            "scale": self.width**-0.5,
            "softcap": self.softcap,
        }


def wide(arguments: dict[str, Tensor | float | None]) -> dict[str, Tensor | float | None]:
    """The same call with q, k and v in float64."""
    return {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in arguments.items()}


def check(arguments: dict[str, Tensor | float | None], out: Tensor, lse: Tensor) -> None:
    """err(ours) <= 2 * err(torch in float32 from the same inputs) + 1e-6, against float64; rows without a visible key exactly."""
    exact_out, exact_lse = native.decode_reference(**wide(arguments))  # type: ignore[arg-type]
    plain_out, plain_lse = native.decode_reference(**arguments)  # type: ignore[arg-type]
    dead = torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(lse), dead)
    assert torch.equal(out[dead], torch.zeros_like(out[dead]))
    for ours, plain, exact in ((out[~dead], plain_out[~dead], exact_out[~dead]), (lse[~dead], plain_lse[~dead], exact_lse[~dead])):
        if ours.numel():
            # A value of 1e-6 is one or two units in the last place of the largest results here, which are near 8.
            assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
