"""Keys in pages: runs from rows, and attention over them as over the gathered keys."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from torchwrap import native
from torchwrap.attention import pages
from torchwrap.attention.attend import attend
from torchwrap.attention.pages import Pages, attend_pages, refuses
from torchwrap.attention.service import Service
from torchwrap.core.errors import KernelError, TorchwrapWarning

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())
MEMORY = 400


def tables(page: int, lengths: list[int], gap: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of sequences in pages of any order, the first page of all but the first shared with it; `gap` keys of nobody between them."""
    choose, found, first, end = random.Random(3), [], [], []
    shared = None
    for length in lengths:
        own = [row for at in choose.sample(range(MEMORY // page), -(-length // page)) for row in range(at * page, at * page + page)][
            :length
        ]
        shared = shared or own[:page]
        own[: len(shared)] = shared[:length]
        first.append(len(found))
        found += own
        end.append(len(found))
        found += [MEMORY - 1] * gap
    return torch.tensor(found), torch.tensor(first), torch.tensor(end)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("page", [1, 4, 16, 200])
def test_runs_hold_the_rows_of_each_sequence_in_order(page: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LONGEST", 50)
    rows, first, end = tables(page, [33, 1, 130, 17], gap)
    found = Pages.of(rows, first, end)
    for index, (a, b) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
        runs = found.runs[found.run_of[index] : found.run_of[index + 1]].tolist()
        assert [row for begin, stop in runs for row in range(begin, stop)] == rows[a:b].tolist()
        assert all(0 < stop - begin <= 50 for begin, stop in runs)
    assert len(found.runs) == found.run_of[-1]


def test_no_sequences() -> None:
    none = torch.zeros(0, dtype=torch.long)
    found = Pages.of(none, none, none)
    assert found.runs.shape == (0, 2) and found.run_of.tolist() == [0]


@needs_native
@pytest.mark.parametrize("options", [{}, {"sinks": torch.tensor([0.5, 3.0, -1.0, 0.0])}, {"softcap": 1.5, "scale": 0.4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_over_gathered_keys(dtype: torch.dtype, options: dict[str, Any]) -> None:
    rows, first, end = tables(16, [33, 1, 130, 17])
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(4, 4, 1, 8, generator=generator).to(dtype)
    k, v = (torch.randn(MEMORY, 2, width, generator=generator).to(dtype) for width in (8, 6))
    assert refuses(q, k, v) is None
    out = attend_pages(q, k, v, Pages.of(rows, first, end), **options)
    for index in range(4):
        held = rows[first[index] : end[index]]
        expected = attend(q[index : index + 1], k[held].transpose(0, 1)[None], v[held].transpose(0, 1)[None], **options)
        torch.testing.assert_close(out[index : index + 1], expected, rtol=1e-5, atol=1e-6)
    service = Service()
    assert torch.equal(service.attend_pages("layer", q, k, v, Pages.of(rows, first, end), **options), out)
    assert [key for key in service.stats()["served"] if key.startswith("layer cpu decode, pages")]
    assert "where they lie" in service.explain()


@needs_native
def test_keys_are_gathered_once_a_kernel_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, first, end = tables(16, [33, 1, 130, 17])
    q, k, v = torch.randn(4, 4, 1, 8), torch.randn(MEMORY, 2, 8), torch.randn(MEMORY, 2, 6)
    held = Pages.of(rows, first, end)
    expected = attend_pages(q, k, v, held)

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise KernelError("no such card")

    monkeypatch.setattr(pages, "attend_pages", fail)
    service = Service()
    assert service.reads_pages(q, k, v)
    with pytest.warns(TorchwrapWarning, match="no such card"):
        torch.testing.assert_close(service.attend_pages("layer", q, k, v, held), expected, rtol=1e-5, atol=1e-6)
    assert not service.reads_pages(q, k, v) and Service().reads_pages(q, k, v)
    with pytest.raises(KernelError):
        Service("cpu").attend_pages("layer", q, k, v, held)


@needs_native
def test_what_cannot_be_read_where_it_lies_is_named() -> None:
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(20, 2, 8)
    for given, reason in {
        "float64": (q.double(), k.double(), k.double()), "bfloat16": (q, k.bfloat16(), k), "[1, 400, 1, 8]": (q.repeat(1, 100, 1, 1), k, k),
        "(1,": (q, k.transpose(0, 2).contiguous().transpose(0, 2), k), "meta": (q.to("meta"), k, k), "[20, 2, 0]": (q, k, k[:, :, :0]),
    }.items():  # fmt: skip
        assert given in (refuses(*reason) or "")
    assert not Service("eager").reads_pages(q, k, k) and Service("cpu").reads_pages(q, k, k)
