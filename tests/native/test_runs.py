"""`decode_runs` computes what `decode` computes of the same keys when they are gathered."""

from __future__ import annotations

import pytest
import torch

from tests.native.test_decode import DTYPES, SETS
from torchwrap import native
from torchwrap.core.errors import ConfigError
from torchwrap.native.decode import decode, decode_runs, run

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

ROWS, HEADS = 900, 2
RUNS = [[(0, 256), (700, 780), (300, 301)], [(256, 300)], [], [(780, 900), (0, 64), (10, 10), (400, 656)]]
"""Of four sequences; pages are shared by two, one is empty, one sequence has none."""


def made(dtype: torch.dtype, rows: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(len(RUNS), HEADS, rows, 40, generator=generator).to(dtype)
    k, v = (torch.randn(ROWS, HEADS, width, generator=generator).to(dtype).transpose(0, 1) for width in (40, 24))
    runs = torch.tensor([run for of in RUNS for run in of], dtype=torch.int32)
    return q, k, v, runs, torch.tensor([0, 3, 4, 4, 8], dtype=torch.int32)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_is_decoding_of_the_gathered_keys(dtype: torch.dtype, softcap: float | None) -> None:
    q, k, v, runs, run_of = made(dtype)
    out, lse = decode_runs(q, k, v, runs, run_of, scale=0.2, softcap=softcap)
    for index, of in enumerate(RUNS):
        columns = torch.tensor([row for first, end in of for row in range(first, end)], dtype=torch.long)
        expected = decode(q[index : index + 1], k[None, :, columns], v[None, :, columns], scale=0.2, softcap=softcap)
        torch.testing.assert_close((out[index], lse[index]), (expected[0][0], expected[1][0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_instruction_set_and_number_of_threads(instruction_set: str) -> None:
    q, k, v, runs, run_of = made(torch.float32, rows=64)
    k, v = (tensor.expand(len(RUNS), -1, -1, -1) for tensor in (k, v))
    results = [run(q, k, v, None, None, None, 0.2, 0.0, instruction_set, threads, (runs, run_of)) for threads in (1, 2, 7)]
    torch.testing.assert_close(results[0][0], decode_runs(q, k[0], v[0], runs, run_of, scale=0.2)[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rows_of_no_run_are_never_read() -> None:
    q, k, v, runs, run_of = made(torch.float32)
    expected = decode_runs(q, k, v, runs, run_of, scale=0.2)
    for tensor in (k, v):
        tensor[:, 301:400] = tensor[:, 656:700] = torch.nan
    found = decode_runs(q, k, v, runs, run_of, scale=0.2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_runs_and_no_sequences() -> None:
    q, k, v, *_ = made(torch.float32)
    none = torch.zeros(0, 2, dtype=torch.int32)
    out, lse = decode_runs(q, k, v, none, torch.zeros(5, dtype=torch.int32), scale=1.0)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert decode_runs(q[:0], k, v, none, torch.zeros(1, dtype=torch.int32), scale=1.0)[0].shape == (0, HEADS, 3, 24)


@pytest.mark.parametrize(
    ("runs", "run_of"),
    [
        ([[0, 901]], [0, 1, 1, 1, 1]), ([[-1, 5]], [0, 1, 1, 1, 1]), ([[5, 3]], [0, 1, 1, 1, 1]), ([[0, 5]], [0, 2, 2, 2, 2]),
        ([[0, 5]], [0, 1, 0, 1, 1]), ([[0, 5]], [1, 1, 1, 1, 1]), ([[0, 5]], [0, 1]), ([0, 5], [0, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_what_would_be_read_as_addresses_is_refused(runs: list[list[int]], run_of: list[int]) -> None:
    q, k, v, *_ = made(torch.float32)
    with pytest.raises(ConfigError):
        decode_runs(q, k, v, torch.tensor(runs, dtype=torch.int32), torch.tensor(run_of, dtype=torch.int32), scale=1.0)


def test_wrong_shapes_and_types_are_refused() -> None:
    q, k, v, runs, run_of = made(torch.float32)
    for given in (
        (q, k[None], v[None], runs, run_of),
        (q, k[:1], v, runs, run_of),
        (q, k, v, runs.long(), run_of),
        (q.half(), k, v, runs, run_of),
    ):
        with pytest.raises(ConfigError):
            decode_runs(*given, scale=1.0)
