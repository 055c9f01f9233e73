"""Fixtures of the contract suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import torchwrap as tw
from tests.contract.cases import Case
from tests.contract.compare import within
from tests.models import ModelFixture


@pytest.fixture(autouse=True)
def case_and_model(request: pytest.FixtureRequest) -> Iterator[None]:
    """The tolerance of the case; and where the model lacks what the technique needs, its refusal instead of the test."""
    given = getattr(request.node, "callspec", None)
    case, fixture = (None, None) if given is None else (given.params.get("case"), given.params.get("fixture"))
    if isinstance(case, Case) and isinstance(fixture, ModelFixture) and not _of_use(case, fixture):
        pytest.skip(f"{fixture.name} has nothing for {case.technique}, which refuses it")
    with within(case.tolerance if isinstance(case, Case) else {}):
        yield


_of_use_known: dict[tuple[str, str], bool] = {}


def _of_use(case: Case, fixture: ModelFixture) -> bool:
    """Whether the model has what the technique needs. Found out once in each process, and with it that the technique refuses the others."""
    pair = case.name, fixture.name
    if pair not in _of_use_known:
        fits = case.needs(model := fixture.build())
        if not fits:
            with pytest.raises(tw.UnsupportedModelError):
                case.apply(model)
        _of_use_known[pair] = fits
    return _of_use_known[pair]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from other tests, and none left for them."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
