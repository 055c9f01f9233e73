"""Attention over several processes equals attention in one, forward and backward; and a process that leaves is an error that says where."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.attention import distributed_cases as cases
from tests.attention.distributed_cases import HEADS, KV_HEADS, MASKS, RINGS, TOKENS, VALUE_WIDTH, WIDTH, Inputs, Layer
from tests.attention.processes import Results, close, of, together
from torchwrap.attention.contract import checked
from torchwrap.attention.distributed.agreement import fingerprint
from torchwrap.attention.distributed.blocks import Link, best_count, equal_work, pipeline_seconds
from torchwrap.attention.distributed.ring import shard, unshard
from torchwrap.attention.distributed.works import Outstanding, group_size
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.core import errors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return together((2, 4), "tests.attention.distributed_cases", tmp_path_factory)


def whole(inputs: Inputs, mask: str, **options: Any) -> dict[str, Tensor]:
    """One attention in one process in float64, with its gradients."""
    leaves = {name: getattr(inputs, name).double().requires_grad_() for name in ("q", "k", "v", "sinks")}
    sinks = leaves["sinks"] if options.pop("sinks", False) else None
    out, lse = attention(checked(leaves["q"], leaves["k"], leaves["v"], mask=MASKS[mask](), sinks=sinks, **options))
    out.backward(inputs.grad.double())
    return {"out": out.detach(), "lse": lse.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", list(RINGS))
def test_a_ring_equals_one_process(results: Results, size: int, layout: Any, mask: str) -> None:
    found = of(results, size, f"ring {layout} {mask}")
    expected = whole(Inputs.make(), mask, **RINGS[mask])
    for name in ("out", "q", "k", "v"):
        close(unshard([one[name] for one in found], 2, layout), expected[name])
    lse = unshard([one["lse"] for one in found], 2, layout)
    assert torch.equal(lse.isinf(), expected["lse"].isinf())
    close(lse.nan_to_num(neginf=0.0), expected["lse"].nan_to_num(neginf=0.0))
    if "sinks" in expected:
        close(sum(one["sinks"] for one in found), expected["sinks"])


@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_ships_key_heads_only(results: Results, size: int) -> None:
    part = 2 * KV_HEADS * TOKENS // size * (WIDTH + VALUE_WIDTH) * 4
    for one in of(results, size, "ring zigzag causal"):
        assert one["sent"] == (size - 1) * part
        # The gradients are float32 as well here, and go one step farther: home.
        assert one["sent backward"] == (2 * size - 1) * part


@pytest.mark.parametrize(("size", "mask"), [*((2, mask) for mask in MASKS), (4, "causal")])
def test_exchanging_heads_for_tokens_equals_one_process(results: Results, size: int, mask: str) -> None:
    found = of(results, size, f"ulysses {mask}")
    expected = whole(Inputs.make(), mask, sinks=True)
    for name in ("out", "q", "k", "v"):
        close(unshard([one[name] for one in found], 2, "contiguous"), expected[name])


def one_layer(mask: str) -> dict[str, Tensor]:
    """The layer in one process, untiled, in float64."""
    layer = Layer.make()
    leaves = {name: getattr(layer, name).double().requires_grad_() for name in ("x", "qkv", "out", "bias")}
    q, k, v = cases.split_heads(linear(leaves["x"], leaves["qkv"]), 1)
    heads, _ = attention(checked(q, k, v, mask=MASKS[mask]()))
    y = linear(heads.transpose(1, 2).flatten(2), leaves["out"], leaves["bias"])
    y.backward(layer.grad.double())
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in (2, 4) for case in cases.cases_of(size) if case.startswith("tiled")])
def test_a_tiled_layer_equals_the_untiled_one_in_one_process(results: Results, size: int, case: str) -> None:
    found = of(results, size, case)
    expected = one_layer(case.split()[1])
    for rank, one in enumerate(found):
        for name in ("y", "x", "bias"):
            close(one[name], expected[name])
        close(one["qkv"], expected["qkv"][cases.own_rows(rank, size)])
        close(one["out"], expected["out"].chunk(size, 1)[rank])


def test_all_processes_choose_the_same_number_of_blocks(results: Results) -> None:
    counts = [one["count"] for one in of(results, 2, "tiled causal auto")]
    assert len(counts[0]) == 1 and counts[0] == counts[1]


def test_a_process_that_leaves_is_an_error_that_names_the_block(results: Results) -> None:
    left, leaver = of(results, 2, "leaving")
    assert isinstance(left["error"], errors.WorkError) and isinstance(left["error"], RuntimeError)
    assert "block 2" in str(left["error"])
    assert isinstance(leaver["error"], errors.WorkError) and "block 2 failed: this process leaves" in str(leaver["error"])
    for process in (left, leaver):
        assert isinstance(process["later"], errors.WorkError) and "out of step" in str(process["later"])


def test_what_is_refused_before_anything_is_sent_leaves_the_group_in_step(results: Results) -> None:
    found = of(results, 2, "refused")
    for process in found:
        assert all(isinstance(process[case], errors.ConfigError | errors.UnsupportedModelError) for case in ("rows", "ring", "dtype"))
    close(unshard([one["out"] for one in found], 2, "zigzag"), whole(Inputs.make(), "full")["out"])
    assert torch.equal(found[0]["y"], found[1]["y"])


UNLIKE = {
    "length": "size or dtype", "dtype": "size or dtype", "heads": "size or dtype", "layout": "layout", "mask": "mask", "padding": "mask",
    "scale": "scale", "softcap": "softcap", "exchanged mask": "mask", "exchanged scale": "scale", "blocks": "number of blocks",
    "band": "band of the mask",
}  # fmt: skip


def test_processes_that_come_with_different_calls_are_told_so_and_stay_in_step(results: Results) -> None:
    found = of(results, 2, "unlike")
    for process in found:
        for case, word in UNLIKE.items():
            assert isinstance(process.get(case), errors.ConfigError) and f"process 1 came with another {word} than" in str(process[case])
        assert isinstance(process["gone"], errors.ConfigError) and "destroyed" in str(process["gone"])
    close(unshard([one["out"] for one in found], 2, "zigzag"), whole(Inputs.make(), "full")["out"])


def test_masks_are_compared_by_what_they_say() -> None:
    causal = fingerprint(TileMask.causal(1, 8, 8), 2)
    same = [
        TileMask.causal(2, 8, 8), TileMask.padded([8, 8], 8, 8), TileMask.causal(1, 8, 8, key_mask=torch.ones(1, 8, dtype=torch.bool)),
    ]  # fmt: skip
    other = [
        TileMask.window(1, 8, 8, 3), TileMask.padded([8, 7], 8, 8), TileMask.causal(1, 8, 8, q_offset=1),
        TileMask.from_dense(torch.eye(8, dtype=torch.bool)[None, None]),
        TileMask.from_cu_seqlens(torch.tensor([0, 3, 8])), TileMask.from_cu_seqlens(torch.tensor([0, 4, 8])),
    ]  # fmt: skip
    assert [fingerprint(mask, 2) for mask in same] == [causal] * len(same)
    assert len({causal, *(fingerprint(mask, 2) for mask in other)}) == 1 + len(other)
    assert fingerprint(TileMask.full(1, 8, 8), 2) is None


class Fake:
    """A work that may fail, and knows whether it was waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.waited = error, 0
        self.timeout: timedelta | None = None

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waited += 1
        self.timeout = timeout
        if self.error is not None:
            raise self.error


def test_when_a_work_fails_all_others_are_waited_for() -> None:
    fakes = [Fake(), Fake(RuntimeError("timed out")), Fake(RuntimeError("as well")), Fake()]
    works = Outstanding("the sum", timeout_s=3.0)
    with pytest.raises(errors.WorkError, match="the sum of block 1 failed: timed out") as raised, works:
        for block, fake in enumerate(fakes):
            works.start(block, lambda fake=fake: fake)  # type: ignore[misc]
    assert [fake.waited for fake in fakes] == [1, 1, 1, 1]
    assert fakes[0].timeout == timedelta(seconds=3) and raised.value.__cause__ is fakes[1].error


def test_when_computing_fails_what_was_started_is_waited_for() -> None:
    fakes = [Fake(), Fake(RuntimeError("too late to matter"))]
    with pytest.raises(ZeroDivisionError), Outstanding("the sum") as works:
        for block, fake in enumerate(fakes):
            works.start(block, lambda fake=fake: fake)  # type: ignore[misc]
        raise ZeroDivisionError
    assert [fake.waited for fake in fakes] == [1, 1]


def test_a_work_that_cannot_start_is_an_error_after_the_others_ended() -> None:
    fake = Fake()

    def launch() -> Fake:
        raise RuntimeError("no such peer")

    with pytest.raises(errors.WorkError, match="block 1 failed: no such peer"), Outstanding("the sum") as works:
        works.start(0, lambda: fake)
        works.start(1, launch)
    assert fake.waited == 1


def test_waiting_for_a_block_leaves_later_ones_under_way() -> None:
    fakes = [Fake(), Fake()]
    with Outstanding("the sum") as works:
        for block, fake in enumerate(fakes):
            works.start(block, lambda fake=fake: fake)  # type: ignore[misc]
        works.wait(0)
        assert [fake.waited for fake in fakes] == [1, 0]
    assert [fake.waited for fake in fakes] == [1, 1]


def test_without_a_process_group_the_error_says_so() -> None:
    with pytest.raises(errors.ConfigError, match="init_process_group"):
        group_size(None)


def test_causal_blocks_have_equal_work() -> None:
    runs = equal_work(1000, 1000, 4, mask=TileMask.causal(1, 1000, 1000))
    # The sum of visible keys up to row r is r (r + 1) / 2: a quarter, a half and three quarters lie at square roots.
    assert [end for _, end in runs[:3]] == pytest.approx([500, 707, 866], abs=1)
    assert runs[0][0] == 0 and runs[-1][1] == 1000


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("count", [1, 2, 16, 50])
@pytest.mark.parametrize("mask", [None, "causal", "window"])
def test_blocks_are_all_rows_in_order_and_never_empty(rows: int, count: int, mask: str | None) -> None:
    made = {None: None, "causal": TileMask.causal(1, rows, 20), "window": TileMask.window(1, rows, 20, 2)}[mask]
    runs = equal_work(rows, 20, count, mask=made)
    assert [row for first, end in runs for row in range(first, end)] == list(range(rows))
    assert len(runs) <= count and all(first < end for first, end in runs)


def test_a_window_costs_every_row_the_same() -> None:
    runs = equal_work(4000, 4000, 4, mask=TileMask.window(1, 4000, 4000, 10))
    assert [end - first for first, end in runs] == pytest.approx([1000] * 4, abs=6)


def pipeline(count: int, compute_s: float, nbytes: int, link: Link) -> float:
    """Two stages, block by block."""
    reduced = 0.0
    for block in range(count):
        reduced = max(reduced, (block + 1) * compute_s / count) + link.seconds(nbytes / count)
    return reduced


@pytest.mark.parametrize("link", [Link(1e-5, 1e9), Link(1e-3, 1e9), Link(0.0, 1e8), Link(1e-4, 1e12)])
def test_the_predicted_time_is_that_of_a_pipeline_and_the_count_the_fewest_near_its_minimum(link: Link) -> None:
    times = {count: pipeline(count, 4e-3, 1 << 22, link) for count in range(1, 65)}
    for count, seconds in times.items():
        assert pipeline_seconds(count, 4e-3, 1 << 22, link) == pytest.approx(seconds)
    chosen = best_count(4e-3, 1 << 22, link)
    assert times[chosen] <= 1.02 * min(times.values())
    assert all(times[count] > 1.02 * min(times.values()) for count in range(1, chosen))


def test_blocks_that_cost_something_themselves_are_fewer() -> None:
    link = Link(1e-5, 1e9)
    free, dear = best_count(4e-3, 1 << 22, link), best_count(4e-3, 1 << 22, link, block_s=1e-4)
    assert 1 < dear < free
    assert best_count(4e-3, 1 << 22, link, block_s=1.0) == 1


def test_a_sequence_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="30 tokens cannot be divided into 4 equal chunks"):
        shard(torch.zeros(1, 1, 30, 2), 2, 0, 2, "zigzag")
    with pytest.raises(errors.ConfigError, match="'spiral'"):
        shard(torch.zeros(1, 1, 30, 2), 2, 0, 2, "spiral")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_make_the_whole_again(layout: Any, size: int) -> None:
    x = torch.arange(24.0).view(1, 24)
    parts = [shard(x, 1, rank, size, layout) for rank in range(size)]
    assert torch.equal(unshard(parts, 1, layout), x)
    if layout == "zigzag" and size == 2:
        assert parts[0].tolist() == [[*range(6), *range(18, 24)]]


def test_heads_that_cannot_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.attention.distributed import ulysses

    monkeypatch.setattr(ulysses, "group_size", lambda group: (0, 3))
    q, k = torch.zeros(1, HEADS, 4, 2), torch.zeros(1, KV_HEADS, 4, 2)
    with pytest.raises(errors.ConfigError, match="8 query and 4 key heads cannot be divided among 3 processes"):
        ulysses.ulysses_attend(q, k, k)
