"""`TileMask` against the definition of its conditions written as a loop, and as a tensor that is passed around."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.masks import whole
from torchwrap.attention.masks.dictionary import TileDictionary, of_dense
from torchwrap.attention.masks.fields import TENSOR_FIELDS
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.masks.packing import key_conditions
from torchwrap.core.errors import ConfigError, TorchwrapWarning


def by_definition(mask: TileMask) -> torch.Tensor:
    """The mask from its definition, one element at a time: bool [B, 1, Sq, Sk]."""
    batch, _, q_length, kv_length = mask.shape
    dense = torch.zeros(batch, 1, q_length, kv_length, dtype=torch.bool)
    for b in range(batch):
        for i in range(q_length):
            for j in range(kv_length):
                query, key = int(mask.q_offset) + i, mask.kv_offset + j
                shift = 0 if mask.shift is None else int(mask.shift[b])
                dense[b, 0, i, j] = (
                    (mask.right is None or key <= query + mask.right)
                    and (mask.left is None or key >= query - mask.left)
                    and (mask.chunk is None or (key - shift) // mask.chunk == (query - shift) // mask.chunk)
                    and (mask.kv_start is None or bool(j >= mask.kv_start[b]))
                    and (mask.kv_end is None or bool(j < mask.kv_end[b]))
                    and (mask.key_mask is None or bool(mask.key_mask[b, j]))
                    and (mask.q_segments is None or bool(mask.q_segments[b, i] == mask.k_segments[b, j]))  # type: ignore[index]
                )
    return dense


def a_dictionary(batch: int) -> TileDictionary:
    return of_dense(torch.ones(batch, 1, 4, 4, dtype=torch.bool))


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


SEGMENTS = int32([0, 0, 1, 1, 1], [0, 1, 1, 2, 2])
MASKS: dict[str, Callable[[], TileMask]] = {
    "full": lambda: TileMask.full(2, 3, 7),
    "causal": lambda: TileMask.causal(2, 5, 9),
    "causal, more queries than keys": lambda: TileMask.causal(1, 9, 5),
    "causal at an offset": lambda: TileMask.causal(1, 4, 9, q_offset=2),
    "static cache": lambda: TileMask.causal(1, 2, 12, q_offset=torch.tensor(5)),
    "window": lambda: TileMask.window(2, 6, 10, 3),
    "window of one": lambda: TileMask.window(1, 4, 4, 1),
    "both sides": lambda: TileMask(1, 6, 6, left=2, right=1),
    "later keys": lambda: TileMask.window(1, 3, 5, 4, q_offset=10, kv_offset=8),
    "chunks": lambda: TileMask(1, 7, 9, right=0, chunk=3),
    "chunks after padding": lambda: TileMask(2, 7, 9, right=0, chunk=3, shift=int32(0, 4), kv_start=int32(0, 4)),
    "left padding": lambda: TileMask.padded([3, 7], 7, 7),
    "right padding": lambda: TileMask.padded([3, 7], 5, 7, side="right", causal=False),
    "holes": lambda: TileMask.causal(2, 5, 6, key_mask=torch.rand(2, 6) < 0.6),
    "segments": lambda: TileMask.causal(2, 5, 5, q_segments=SEGMENTS, k_segments=SEGMENTS),
    "one row of segments for all": lambda: TileMask.full(3, 2, 4, q_segments=int32([1, 2]), k_segments=int32([2, 1, 1, 2])),
    "no queries": lambda: TileMask.causal(1, 0, 4),
    "no keys": lambda: TileMask.causal(1, 3, 0),
    "no batch": lambda: TileMask.causal(0, 3, 3),
}


@pytest.fixture(params=MASKS, ids=MASKS.keys())
def mask(request: pytest.FixtureRequest) -> TileMask:
    return MASKS[request.param]()


def test_the_whole_mask_is_its_definition(mask: TileMask) -> None:
    if mask.q_segments is not None and mask.q_segments.shape[0] != mask.shape[0]:
        expected = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool().expand(3, 1, 2, 4)
    else:
        expected = by_definition(mask)
    assert torch.equal(whole(mask), expected)


def test_a_rectangle_is_that_part_of_the_mask(mask: TileMask) -> None:
    batch, _, q_length, kv_length = mask.shape
    rows, columns = (q_length // 3, q_length - q_length // 4), (kv_length // 4, kv_length - kv_length // 3)
    for b in range(batch):
        assert torch.equal(mask.rectangle(b, rows, columns), whole(mask)[b, :, rows[0] : rows[1], columns[0] : columns[1]])


def test_a_mask_of_a_rectangle_keeps_its_positions(mask: TileMask) -> None:
    batch, _, q_length, kv_length = mask.shape
    rows, columns, rest = (q_length // 2, q_length), (kv_length // 3, kv_length), (batch // 2, batch)
    part = mask.sub(rows=rows, columns=columns, batch=rest)
    assert tuple(part.shape) == (batch - batch // 2, 1, q_length - q_length // 2, kv_length - kv_length // 3)
    assert torch.equal(whole(part), whole(mask)[rest[0] :, :, rows[0] :, columns[0] :])


def test_no_key_lies_outside_the_range_of_keys(mask: TileMask) -> None:
    dense = whole(mask)
    for b in range(mask.shape[0]):
        first, end = mask.key_range(b)
        assert not dense[b, ..., :first].any() and not dense[b, ..., end:].any()


def test_the_range_of_keys_is_tight_for_padding_and_static_caches() -> None:
    assert [TileMask.padded([3, 7], 7, 7).key_range(b) for b in range(2)] == [(4, 7), (0, 7)]
    assert TileMask.causal(1, 2, 12, q_offset=torch.tensor(5)).key_range(0) == (0, 7)
    assert TileMask.window(1, 2, 12, 3).key_range(0) == (8, 12)
    assert TileMask.causal(1, 2, 12, kv_start=int32(3), kv_end=int32(3)).key_range(0) == (0, 0)


def test_plain_names_masks_without_data() -> None:
    assert [TileMask.full(1, 2, 2).plain, TileMask.causal(1, 2, 2).plain, TileMask.window(1, 2, 2, 1).plain] == ["full", "causal", "window"]
    assert TileMask(1, 2, 2, left=1, right=1).plain == "window"
    assert [TileMask.padded([2], 2, 2).plain, TileMask(1, 2, 2, chunk=2).plain] == [None, None]


def test_a_static_cache_may_count_on_after_the_mask_was_made() -> None:
    position = torch.tensor(3)
    mask = TileMask.causal(1, 1, 8, q_offset=position)
    position.add_(1)
    assert mask.first_query() == 3 and int(whole(mask).sum()) == 4


PASSED_ON: dict[str, Callable[[TileMask], torch.Tensor]] = {
    "detach": lambda mask: mask.detach(),
    "clone": lambda mask: mask.clone(),
    "contiguous": lambda mask: mask.contiguous(),
    "alias": lambda mask: torch.ops.aten.alias(mask),
    "to the same device": lambda mask: mask.to("cpu"),
    "to the same dtype": lambda mask: mask.to("cpu", torch.bool),
    "as bool": lambda mask: mask.bool(),
    "narrow": lambda mask: mask.narrow(2, 0, mask.shape[2]),
    "a copy on the same device": lambda mask: mask.to("cpu", copy=True),
    "cut to all columns": lambda mask: mask[:, :, :, : mask.shape[3]],
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
}


@pytest.mark.parametrize("passed", PASSED_ON.values(), ids=PASSED_ON.keys())
@pytest.mark.parametrize(("made_in", "used_in"), [(False, False), (False, True), (True, False), (True, True)])
def test_inference_mode_keeps_masks_lazy(passed: Callable[[TileMask], torch.Tensor], made_in: bool, used_in: bool) -> None:
    with torch.inference_mode(made_in):
        mask = TileMask.padded([3, 7], 7, 7)
    with torch.inference_mode(used_in), warnings.catch_warnings():
        warnings.simplefilter("error")
        same = passed(mask)
        assert isinstance(same, TileMask) and torch.equal(whole(same), whole(mask))
        assert mask.key_range(0) == (4, 7) and int(mask.tiles(4, 4).hi.max()) == 2


def test_what_was_worked_out_in_inference_mode_serves_training() -> None:
    mask = TileMask.padded([3, 7], 7, 7)
    with torch.inference_mode():
        mask.tiles(4, 4)
        mask.live_rows()
    assert not mask.live_rows().is_inference() and not mask.tiles(4, 4).lo.is_inference()
    x = torch.ones(2, 7, requires_grad=True)
    (x * mask.live_rows()).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, mask.live_rows().float())


@pytest.mark.parametrize("passed", PASSED_ON.values(), ids=PASSED_ON.keys())
def test_passing_a_mask_on_keeps_it_lazy(mask: TileMask, passed: Callable[[TileMask], torch.Tensor]) -> None:
    before = TileMask.materialisations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = passed(mask)
    assert isinstance(same, TileMask) and TileMask.materialisations == before
    assert same.shape == mask.shape and torch.equal(whole(same), whole(mask))


def test_slices_of_rows_columns_and_batch_stay_lazy(mask: TileMask) -> None:
    before = TileMask.materialisations
    part = mask[1:, :, -2:, :-1]
    assert isinstance(part, TileMask) and TileMask.materialisations == before
    assert torch.equal(whole(part), whole(mask)[1:, :, -2:, :-1])


def test_a_mask_moves_with_all_it_holds() -> None:
    moved = TileMask.padded([3, 7], 7, 7).to("meta")
    assert isinstance(moved, TileMask) and moved.device.type == "meta"
    assert moved.kv_start is not None and moved.kv_start.device.type == "meta"


def test_a_mask_can_be_saved(mask: TileMask) -> None:
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    assert torch.equal(whole(torch.load(file, weights_only=False)), whole(mask))


OTHER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not": lambda mask: ~mask,
    "and": lambda mask: mask & True,
    "to floats": lambda mask: mask.float(),
    "select": lambda mask: mask[:, 0],
    "second operand": lambda mask: torch.ones(2, 1, 7, 7) * mask,
    "counted": lambda mask: mask + torch.ones(7, dtype=torch.int64),
    "masked_fill": lambda mask: torch.ones(2, 4, 7, 7).masked_fill(~mask, -1.0),
    "to_dense": lambda mask: mask.to_dense(),
}


@pytest.mark.parametrize("use", OTHER.values(), ids=OTHER.keys())
def test_other_operations_see_the_dense_mask_are_counted_and_warn(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    mask, before = TileMask.padded([3, 7], 7, 7), TileMask.materialisations
    with pytest.warns(TorchwrapWarning, match="whole mask"):
        result = use(mask)
    assert TileMask.materialisations == before + 1
    assert type(result) is torch.Tensor and torch.equal(result, use(whole(mask)))


def test_the_warning_names_the_operation_and_the_line_of_the_user() -> None:
    with pytest.warns(TorchwrapWarning, match="aten.bitwise_not") as seen:
        _ = ~TileMask.causal(1, 4, 4)
    assert [warning.filename for warning in seen] == [__file__]


ADDING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "scores + mask": lambda mask, scores: scores + mask,
    "mask + scores": lambda mask, scores: mask + scores,
    "scores += mask": lambda mask, scores: scores.clone().add_(mask),
    "scores with gradients": lambda mask, scores: scores.clone().requires_grad_() + mask,
    "a part of it": lambda mask, scores: scores[..., :5] + mask[:, :, :, :5],
    "bfloat16": lambda mask, scores: scores.bfloat16() + mask,
}


@pytest.mark.parametrize("use", ADDING.values(), ids=ADDING.keys())
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_added_to_scores_hides_what_it_does_not_show(
    use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], inference: bool
) -> None:
    with torch.inference_mode(inference):
        mask, scores = TileMask.padded([3, 7], 7, 7), torch.randn(2, 4, 7, 7)
        with pytest.warns(TorchwrapWarning, match="add"):
            found = use(mask, scores)
        added = torch.zeros(2, 1, 7, 7, dtype=found.dtype).masked_fill(~whole(mask), torch.finfo(found.dtype).min)
        assert torch.equal(found, use(added, scores))


TAKING: dict[str, Callable[[TileMask, torch.Tensor], object]] = {
    "scores - mask": lambda mask, scores: torch.sub(scores, mask, alpha=1e4),
    "mask * least": lambda mask, scores: mask * torch.finfo(torch.float32).min,
    "mask * tensor": lambda mask, scores: mask * torch.tensor(-1e4),
    "mask + number": lambda mask, scores: mask + 1.0,
}


@pytest.mark.parametrize("use", TAKING.values(), ids=TAKING.keys())
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_of_booleans_is_no_number_that_is_subtracted_or_multiplied(
    use: Callable[[TileMask, torch.Tensor], object], inference: bool
) -> None:
    with torch.inference_mode(inference):
        mask, scores = TileMask.padded([3, 7], 7, 7), torch.ones(2, 4, 7, 7)
        with pytest.raises(ConfigError, match="as if it were one of 0 and -inf") as caught:
            use(mask, scores)
    assert "masked_fill" in str(caught.value.fix) and bool((scores == 1).all())


WRITING: dict[str, Callable[[TileMask], object]] = {
    "and": lambda mask: mask.logical_and_(whole(mask)),
    "fill": lambda mask: mask.fill_(True),
    "copy": lambda mask: mask.copy_(whole(mask)),
    "element": lambda mask: mask.__setitem__((0, 0), True),
    "out": lambda mask: torch.logical_and(whole(mask), whole(mask), out=mask),
}


@pytest.mark.parametrize("write", WRITING.values(), ids=WRITING.keys())
def test_writing_into_a_mask_is_refused_and_changes_nothing(write: Callable[[TileMask], object]) -> None:
    mask, before = TileMask.padded([3, 7], 7, 7), TileMask.materialisations
    expected = whole(mask)
    with pytest.raises(ConfigError, match="would write into"):
        write(mask)
    assert torch.equal(whole(mask), expected) and TileMask.materialisations == before


def test_a_mask_may_be_read_by_operations_that_write_elsewhere() -> None:
    mask = TileMask.padded([3, 7], 7, 7)
    with pytest.warns(TorchwrapWarning, match="masked_fill_"):
        filled = torch.zeros(2, 1, 7, 7).masked_fill_(mask, 1.0)
    assert torch.equal(filled.bool(), whole(mask))


def test_torchs_own_attention_takes_it_as_a_dense_mask() -> None:
    mask, q = TileMask.padded([3, 7], 7, 7, side="right"), torch.randn(2, 3, 7, 8)
    with pytest.warns(TorchwrapWarning, match="whole mask"):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=whole(mask)))


def test_other_processes_share_what_a_mask_holds(mask: TileMask) -> None:
    assert mask.share_memory_() is mask
    held = [getattr(mask, name) for name in TENSOR_FIELDS if getattr(mask, name) is not None]
    assert all(tensor.is_shared() for tensor in held)


def test_integers_of_numpy_are_integers() -> None:
    mask = TileMask.window(np.int64(1), 4, np.int32(6), np.int64(3), q_offset=np.int16(1))
    assert torch.equal(whole(mask), whole(TileMask.window(1, 4, 6, 3, q_offset=1))) and type(mask.left) is int


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "negative window": (lambda: TileMask.window(1, 4, 4, -3), "-3"),
    "window of nothing": (lambda: TileMask.window(1, 4, 4, 0), "0"),
    "negative left": (lambda: TileMask(1, 4, 4, left=-1), "left = -1"),
    "negative right": (lambda: TileMask(1, 4, 4, right=-1), "right = -1"),
    "chunks of nothing": (lambda: TileMask(1, 4, 4, chunk=0), "chunk = 0"),
    "an imaginary window": (lambda: TileMask.window(1, 4, 4, 1j), "1j"),
    "a length as text": (lambda: TileMask.causal(1, 4, "4"), "kv_length = '4'"),
    "an offset as text": (lambda: TileMask.causal(1, 4, 4, kv_offset="4"), "kv_offset = '4'"),
    "no lengths": (lambda: TileMask.padded(None, 8, 8), "Lengths None"),
    "imaginary lengths": (lambda: TileMask.padded([1j], 8, 8), "Lengths .*1j"),
    "a flag as a number": (lambda: TileMask(1, 4, 4, right=True), "right = True"),
    "negative length": (lambda: TileMask.causal(1, -4, 4), "q_length = -4"),
    "unknown condition": (lambda: TileMask(1, 4, 4, windw=3), "windw"),
    "padding of another batch": (lambda: TileMask.causal(3, 4, 4, kv_start=int32(0, 1)), r"\[2\]"),
    "padding of another length": (lambda: TileMask.causal(2, 4, 4, key_mask=torch.ones(2, 5, dtype=torch.bool)), r"\[2, 5\]"),
    "padding in int64": (lambda: TileMask.causal(2, 4, 4, kv_start=torch.tensor([0, 1])), "int64"),
    "padding as numbers": (lambda: TileMask.causal(2, 4, 4, key_mask=torch.ones(2, 4)), "float32"),
    "padding as a list": (lambda: TileMask.causal(2, 4, 4, kv_start=[0, 1]), "list"),
    "lengths as fractions": (lambda: TileMask.padded(torch.tensor([2.5, 3.0]), 8, 8), "2.5"),
    "a dictionary of another length": (lambda: TileMask(1, 4, 300, dictionary=a_dictionary(1)), r"300"),
    "a dictionary of another batch": (lambda: TileMask(3, 4, 4, dictionary=a_dictionary(2)), r"3 batch rows"),
    "lengths above the keys": (lambda: TileMask.padded([3, 9], 8, 8), "9"),
    "an unknown side": (lambda: TileMask.padded([3, 8], 8, 8, side="top"), "top"),
    "half of the segments": (lambda: TileMask.causal(1, 2, 2, q_segments=int32([0, 1])), "come together"),
    "a shift of no chunks": (lambda: TileMask.causal(1, 2, 2, shift=int32(1)), "shift"),
    "an offset per row": (lambda: TileMask.causal(2, 2, 2, q_offset=torch.tensor([0, 1])), "q_offset"),
    "a fractional offset": (lambda: TileMask.causal(2, 2, 2, q_offset=torch.tensor(0.5)), "q_offset"),
    "two devices": (lambda: TileMask.causal(1, 2, 2, kv_start=int32(0), device="meta"), "kv_start is on cpu"),
    "a rectangle outside": (lambda: TileMask.causal(1, 2, 2).rectangle(0, (0, 3), (0, 2)), "rows 0 to 3 of 2"),
    "a batch row outside": (lambda: TileMask.causal(2, 2, 2).rectangle(2, (0, 1), (0, 2)), "2"),
    "a part outside": (lambda: TileMask.causal(2, 2, 2).sub(columns=(1, 5)), "columns 1 to 5 of 2"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_conditions_are_refused_by_name(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_masks_without_numbers_are_kept_or_refused_by_name() -> None:
    valid = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert set(key_conditions(valid)) == {"key_mask"}
    with pytest.raises(ConfigError, match="meta"):
        TileMask.from_dense(torch.ones(1, 1, 5, 5, dtype=torch.bool, device="meta"))
