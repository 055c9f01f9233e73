"""`decode` computes what its reference computes, for every kind of input, instruction set and number of threads."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from tests.native.cases import Case, check
from torchwrap import native
from torchwrap.core.errors import BudgetError, ConfigError
from torchwrap.native.decode import run

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETS = list(native.instruction_sets())
ROWS = [1, 2, 3, 4, 5, 7, 8, 16, 33, 64]


def random_case(seed: int, dtype: torch.dtype) -> Case:
    choose = random.Random(seed)
    return Case(
        dtype=dtype,
        batch=choose.choice([1, 2, 3]),
        heads=choose.choice([1, 2, 4]),
        rows=choose.choice(ROWS),
        keys=choose.choice([1, 2, 17, 64, 127, 300, 777, 1500]),
        width=choose.choice([1, 5, 16, 40, 64, 80, 96, 128, 200, 256]),
        value_width=choose.choice([1, 3, 16, 64, 72, 128]),
        ranges=choose.random() < 0.4,
        limits=choose.random() < 0.4,
        softcap=choose.choice([None, None, 5.0]),
        seed=seed,
    )


def call(case: Case, instruction_set: str | None = None, threads: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = case.tensors()
    scale, softcap = arguments.pop("scale"), arguments.pop("softcap")
    return run(*arguments.values(), scale, softcap or 0.0, instruction_set, threads)  # type: ignore[arg-type]


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_random_calls_keep_the_error_law(seed: int, dtype: torch.dtype, instruction_set: str) -> None:
    for part in range(5):
        case = random_case(100 * seed + part, dtype)
        check(case.tensors(), *call(case, instruction_set))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows(rows: int, instruction_set: str) -> None:
    case = Case(rows=rows, keys=517, dtype=torch.bfloat16, width=80, value_width=48)
    check(case.tensors(), *call(case, instruction_set))


@pytest.mark.parametrize("width", [1, 2, 15, 16, 31, 32, 33, 127, 129, 500, 512])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_width_up_to_the_largest(width: int, dtype: torch.dtype) -> None:
    for rows in (2, 3, 4, 5, 8):  # each has its own way on some processor
        case = Case(width=width, value_width=513 - width, keys=131, rows=rows, dtype=dtype)
        check(case.tensors(), *call(case))


@pytest.mark.parametrize("rows", [3, 6])
def test_keys_that_fill_no_vector(rows: int) -> None:
    for keys in range(1, 36):
        case = Case(rows=rows, keys=keys, dtype=torch.bfloat16, width=40)
        check(case.tensors(), *call(case))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_result_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(keys=5000, heads=3, rows=3, dtype=dtype)
    alone = call(case, threads=1)
    for threads in (2, 3, 7):
        together = call(case, threads=threads)
        assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_keys_and_values_that_no_row_sees_are_never_read(rows: int, dtype: torch.dtype) -> None:
    case = Case(keys=700, rows=rows, dtype=dtype)
    arguments = case.tensors()
    k, v = arguments["k"], arguments["v"]
    assert isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    k[:, :, :100], v[:, :, :100], k[:, :, 600:], v[:, :, 600:] = (float("nan"),) * 4
    arguments |= {"first": torch.tensor([100], dtype=torch.int32), "end": torch.tensor([600], dtype=torch.int32)}
    out, lse = native.decode(**arguments)  # type: ignore[arg-type]
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_window_of_a_long_cache_gives_the_bits_of_that_piece_alone(dtype: torch.dtype) -> None:
    arguments = Case(keys=3000, rows=3, dtype=dtype).tensors()
    k, v = arguments["k"], arguments["v"]
    assert isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    window = arguments | {"limits": torch.tensor([1111, 2222], dtype=torch.int32).expand(1, 3, 2)}
    piece = arguments | {"k": k[:, :, 1111:2222], "v": v[:, :, 1111:2222]}
    for ours, alone in zip(native.decode(**window), native.decode(**piece), strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours, alone)


def test_rows_that_see_nothing_give_zero_and_minus_infinity() -> None:
    case = Case(rows=3)
    limits = torch.tensor([[[0, 300], [7, 7], [300, 900]]], dtype=torch.int32)
    arguments = case.tensors() | {"limits": limits}
    out, lse = native.decode(**arguments)  # type: ignore[arg-type]
    assert torch.equal(out[:, :, 1:], torch.zeros_like(out[:, :, 1:]))
    assert torch.equal(lse[0, 0].isneginf(), torch.tensor([False, True, True]))
    check(arguments, out, lse)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"heads": 0}, {"rows": 0}, {"keys": 0}], ids=str)
def test_empty_dimensions(shape: dict[str, int]) -> None:
    case = Case(**shape)  # type: ignore[arg-type]
    out, lse = native.decode(**case.tensors())  # type: ignore[arg-type]
    assert out.shape == (case.batch, case.heads, case.rows, 64) and lse.shape == out.shape[:3]
    assert torch.equal(out, torch.zeros_like(out)) and lse.isneginf().all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_what_is_not_finite_comes_out_as_in_the_reference(where: str, value: float, dtype: torch.dtype, instruction_set: str) -> None:
    arguments = Case(rows=3, keys=700, dtype=dtype).tensors()
    tensor = arguments[where]
    assert isinstance(tensor, torch.Tensor)
    tensor[0, 1, 2, 5] = value
    scale, softcap = arguments.pop("scale"), arguments.pop("softcap")
    out, lse = run(*arguments.values(), scale, softcap or 0.0, instruction_set)  # type: ignore[arg-type]
    exact_out, exact_lse = native.decode_reference(**arguments, scale=scale)  # type: ignore[arg-type]
    assert torch.equal(out.isnan(), exact_out.isnan())
    # An infinite score makes the logarithm infinite in the reference, here it may be no number: neither can be merged.
    assert torch.equal(lse.isfinite(), exact_lse.isfinite())


def test_strided_and_broadcast_inputs_give_the_same_bits() -> None:
    arguments = Case(batch=2, rows=3, dtype=torch.bfloat16).tensors()
    plain = {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    odd = dict(plain)
    for name in ("q", "k", "v"):
        value = plain[name]
        assert isinstance(value, torch.Tensor)
        roomy = torch.full((*value.shape[:2], value.shape[2] * 2, value.shape[3] + 3), float("nan"), dtype=value.dtype)
        odd[name] = roomy[:, :, ::2, 1:-2].copy_(value)
    wanted = native.decode(**plain)  # type: ignore[arg-type]
    for given in (arguments, odd):
        out, lse = native.decode(**given)  # type: ignore[arg-type]
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    key = plain["k"]
    assert isinstance(key, torch.Tensor)
    shared = plain | {"k": key[:, :1].expand(-1, 2, -1, -1)}
    copied = plain | {"k": key[:, :1].expand(-1, 2, -1, -1).contiguous()}
    assert torch.equal(native.decode(**shared)[0], native.decode(**copied)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_half_number_is_read_as_it_is(instruction_set: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].view(1, -1, 1, 64)
    count = every.shape[1]
    zero = torch.zeros(1, count, 1, 64, dtype=torch.float16)
    out, lse = run(zero, zero, every, None, None, None, 1.0, 0.0, instruction_set)
    assert torch.equal(out, every.float())
    assert torch.equal(lse, torch.zeros(1, count, 1))


WRONG = {
    "three dimensions": {"q": torch.zeros(2, 4, 64)},
    "other type": {"k": torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)},
    "float64": {name: torch.zeros(1, 2, 300 if name != "q" else 4, 64, dtype=torch.float64) for name in "qkv"},
    "other device": {"v": torch.zeros(1, 2, 300, 64, device="meta")},
    "last dimension not contiguous": {"k": torch.zeros(1, 2, 64, 300).transpose(2, 3)},
    "other width": {"q": torch.zeros(1, 2, 4, 32)},
    "other heads": {"v": torch.zeros(1, 1, 300, 64)},
    "other length": {"v": torch.zeros(1, 2, 299, 64)},
    "too many rows": {"q": torch.zeros(1, 2, 65, 64)},
    "too wide": {"v": torch.zeros(1, 2, 300, 513)},
    "range of int64": {"first": torch.zeros(1, dtype=torch.int64)},
    "range of other shape": {"end": torch.zeros(2, dtype=torch.int32)},
    "limits of other shape": {"limits": torch.zeros(1, 4, dtype=torch.int32)},
    "negative softcap": {"softcap": -1.0},
    "softcap zero": {"softcap": 0.0},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_an_address_is_taken(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"torchwrap\.native\.decode"):
        native.decode(**(Case().tensors() | wrong))  # type: ignore[arg-type]


def test_no_memory_is_an_error_with_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def torchwrap_decode(self, call: int) -> int:
            return 1  # what the library says when malloc gave nothing

    monkeypatch.setattr(sys.modules[run.__module__], "library", Full)
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 500, 16)
    with pytest.raises(BudgetError, match="2 x 3 x 4 rows of 16 over 500 keys, at least 1728 bytes") as caught:
        run(q, k, k, None, None, None, 1.0, 0.0, None)
    assert isinstance(caught.value, MemoryError) and caught.value.needed == 1728


def test_operator_passes_the_checks_of_torch() -> None:
    case = Case(keys=40, rows=2, width=16, value_width=8, ranges=True, limits=True)
    q, k, v, first, end, limits, scale, _ = case.tensors().values()
    operator = torch.ops.torchwrap.decode.default
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]  # type: ignore[union-attr]
    torch.library.opcheck(operator, (q, k, v, None, None, None, scale, 0.0))
    torch.library.opcheck(operator, (*inputs, first, end, limits, scale, 3.0))


def test_gradients_are_those_of_the_reference() -> None:
    arguments = Case(rows=3, keys=90, limits=True, softcap=3.0).tensors()
    found = []
    for function in (native.decode, native.decode_reference):
        leaves = {name: arguments[name].clone().requires_grad_() for name in "qkv"}  # type: ignore[union-attr]
        out, lse = function(**(arguments | leaves))  # type: ignore[arg-type]
        (out.sum() + lse[lse.isfinite()].sum()).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
