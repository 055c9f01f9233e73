"""What the activations of a step will take before it was run, from the shapes of the blocks' weights.

A weight matrix keeps its input for its own gradient, and what follows keeps its output; norms keep about two more copies of what runs
through the block. What attention keeps for each pair of tokens is not seen in the weights: nothing with fused kernels, its scores otherwise
(written-out attention, or torch's on a CPU with dropout). Measured on blocks of Llama, Mixtral and GPT-NeoX in float32 this is 89 to 99 %
of what autograd saves, on Llama in bfloat16, whose norms compute in float32, 90 %; on GPT-2 and BERT with dropout in attention 23 to 31 %.
So this is for models of which rehearsal.py cannot make a forward on shapes.

The figures are differences to a step whose blocks are all computed again, whose own working memory is estimated elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torchwrap.activations.choose import Choice, Cost, peak_bytes
from torchwrap.stream.units import Unit

__all__ = ["MODES", "choice_for", "expected_costs", "in_words", "over_recomputed", "recomputes_itself", "swapped_bytes"]

MODES: Mapping[str | None, Choice] = {"keep": "keep", "host": "swap", "disk": "swap"}
"""What becomes of every block with these settings; with the others it is recomputed, "auto" before the first step included."""

_NORMS = 2  # copies of the block's width that norms keep (measured on Llama)
_EXPERTS = 2  # of a mixture that see a token (chosen: usual, and not to be seen in the weights)


def expected_costs(units: Sequence[Unit], rows: int) -> list[Cost]:
    """What each block is expected to save of `rows` tokens (of all sequences together), in order of use; times are unknown, 0.

    Of a model without blocks (layers in a row), what each layer keeps: its input, and its output for what follows. Nothing computes that
    again or moves it, so nothing of it is an input that a recomputation has anyway.
    """
    if not any(unit.kind == "block" for unit in units):
        layers = [unit for unit in units if unit.kind == "leaf" and unit.parent is None]
        return [Cost(unit.index, rows * max(p.dtype.itemsize for p in unit.pieces) * _widths(unit), 0, 0.0) for unit in layers]
    costs = []
    for unit in units:
        if unit.kind != "block" or unit.parent is not None:
            continue
        experts = [other for other in units if other.kind == "expert" and other.parent == unit.index]
        width = _widths(unit) + sum(map(_widths, experts)) * min(_EXPERTS, len(experts)) // max(1, len(experts))
        sizes = Counter(size for piece in unit.pieces if len(piece.shape) == 2 for size in set(piece.shape))
        through = sizes.most_common(1)[0][0] if sizes else 0  # every matrix begins or ends at what runs through the block
        element = max((piece.dtype.itemsize for piece in unit.pieces), default=0)
        costs.append(Cost(unit.index, rows * element * (width + _NORMS * through), rows * element * through, 0.0))
    return costs


def choice_for(unit: Unit, mode: str | None) -> Choice:
    """What becomes of what a unit saves, with this setting; a layer outside of blocks keeps it in any case."""
    return MODES.get(mode, "recompute") if unit.kind == "block" else "keep"


def over_recomputed(uses: Sequence[Cost], choices: Mapping[int, Choice], gradients: Mapping[int, int] | None = None) -> int:
    """Bytes that a step with these choices takes more than one whose blocks are all computed again; never negative.

    Args:
        uses: of the blocks, in the order of the forward.
        choices: by unit.
        gradients: bytes that stay from the backward of a unit on, by unit; what is kept is then there no more.
    """
    again: dict[int, Choice] = {use.unit: "recompute" for use in uses}
    return max(0, peak_bytes(uses, choices, gradients) - peak_bytes(uses, again, gradients))


def swapped_bytes(units: Sequence[Unit], rows: int, mode: str | None) -> int:
    """Bytes that are expected to leave in a forward and to come back in its backward, with this setting."""
    return sum(use.nbytes for use in expected_costs(units, rows) if choice_for(units[use.unit], mode) == "swap")


def in_words(mode: str | None) -> str:
    """What becomes of every block's activations with this setting, before a step was measured."""
    if mode == "auto":
        return "activations: recomputed in the first step, then kept, moved or recomputed as memory and the disk allow"
    where = {"keep": "kept", "host": "moved to host memory and back", "disk": "moved to the disk and back"}
    return f"activations of each block: {where.get(str(mode), 'recomputed')}"


def recomputes_itself(modules: Iterable[object]) -> bool:
    """Whether a model with these modules checkpoints its own blocks."""
    # transformers 5.23: the flag of GradientCheckpointingLayer; see test_a_model_that_checkpoints_itself_is_not_checkpointed_twice
    return any(getattr(module, "gradient_checkpointing", False) for module in modules)


def _widths(unit: Unit) -> int:
    """Numbers per token that go into the unit's matrices and come out of them."""
    whole = {id(piece.whole or piece): piece.whole or piece for piece in unit.pieces}
    flat = sum(sum(piece.shape[:2]) for piece in whole.values() if len(piece.shape) in (2, 4))
    return flat + sum(_EXPERTS * sum(piece.shape[1:]) for piece in whole.values() if len(piece.shape) == 3)
