"""Which kernels there are, and how each is compiled for which family of cards: tiles and warps as data.

A variant is one kernel for one family and head width. A block has `row_warps * key_warps` warps; one warp holds 32 rows on Volta and 16 on
Turing, of one 8-column tile 8 or 4 numbers per lane. The sizes are chosen so that sums, scores and the stage of the next tile fit into 255
registers without spilling (the compile tests assert it) and shared memory stays within the 48 KiB that need no permission from the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["HEAD_WIDTHS", "Family", "Variant", "backward_keys", "backward_rows", "combine", "family_of", "forward", "split"]

Family = Literal["volta", "turing"]
HEAD_WIDTHS = (64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        file: its source, in `kernels/`.
        entry: the kernel in it.
        family: whose tensor-core instructions it uses.
        width: D, elements of a head.
        capped: whether scores are soft-capped; without, the code for it would cost the main loop registers.
        row_warps: warps that share the rows of a block.
        key_warps: warps that share each moving tile.
        keys: rows of a moving tile.
        outputs: of `backward_keys`: 1 for grad_k, 2 for grad_v, 3 for both.
        tiles: tiles of `rows` that lie in shared memory (Q; Q and dO), and as many times two moving ones in total.
    """

    file: str
    entry: str
    family: Family
    width: int
    capped: bool = False
    row_warps: int = 4
    key_warps: int = 1
    keys: int = 64
    outputs: int = 3
    tiles: int = 1

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.row_warps * (32 if self.family == "volta" else 16)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.width // 2 if self.entry == "combine" else 32 * self.row_warps * self.key_warps

    @property
    def shared_bytes(self) -> int:
        """The most shared memory a block takes."""
        return 2 * self.width * (self.tiles * self.rows + 2 * self.keys) if self.tiles else 0

    @property
    def definitions(self) -> tuple[str, ...]:
        """Options of the compiler that make this variant of the source."""
        values = {
            "HEAD": self.width, "ROW_WARPS": self.row_warps, "KEY_WARPS": self.key_warps, "KEYS": self.keys, "OUTPUTS": self.outputs,
            "SOFTCAP": int(self.capped),
        }  # fmt: skip
        return (f"-D{self.family.upper()}", *(f"-D{name}={value}" for name, value in values.items()))


def family_of(capability: tuple[int, int]) -> Family | None:
    """Which instructions a card of this compute capability has; None: no tensor cores."""
    # Later cards run Turing's instruction natively and emulate Volta's.
    return "turing" if capability >= (7, 5) else "volta" if capability >= (7, 0) else None


def forward(family: Family, width: int, capped: bool) -> Variant:
    """A tile of queries of one head in each block."""
    keys = 64 if width == 64 else 32
    return Variant(file="forward.cu", entry="attention", family=family, width=width, capped=capped, keys=keys)


def split(family: Family, width: int, capped: bool) -> Variant:
    """Few queries, their group of heads folded into rows, and the keys shared among blocks and warps."""
    keys = 32 if (family, width) == ("volta", 128) else 64
    return Variant(
        file="forward.cu", entry="attention", family=family, width=width, capped=capped, row_warps=1, key_warps=4, keys=keys
    )


def combine(family: Family, width: int) -> Variant:
    """What `split` left, merged."""
    return Variant(file="combine.cu", entry="combine", family=family, width=width, tiles=0)


def backward_rows(family: Family, width: int, capped: bool) -> Variant:
    """Gradient of q."""
    sizes = _backward(family, width)
    return Variant(file="backward_rows.cu", entry="backward_rows", family=family, width=width, capped=capped, tiles=2, **sizes)


def backward_keys(family: Family, width: int, capped: bool) -> tuple[Variant, ...]:
    """Gradients of k and v: one launch, or two where the sums of both would not fit into registers."""
    launches = (1, 2) if (family, width) == ("volta", 128) else (3,)
    sizes = _backward(family, width)
    return tuple(
        Variant(
            file="backward_keys.cu", entry="backward_keys", family=family, width=width, capped=capped, outputs=outputs, tiles=2, **sizes
        )
        for outputs in launches
    )


def _backward(family: Family, width: int) -> dict[str, int]:
    if family == "volta":
        return {"row_warps": 4 if width == 64 else 2, "keys": 16}
    return {"row_warps": 4, "keys": 64 if width == 64 else 32}
