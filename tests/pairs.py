"""Combinations of the values of several parameters in which each two values meet, in place of all combinations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

__all__ = ["every_two"]


def every_two(*, one_of: int = 2, **parameters: Mapping[str, object]) -> pytest.MarkDecorator:
    """Parametrise over one of `one_of` combinations of the values, given by their ids: any two values of two parameters are in one.

    There are three parameters at least. Where one has fewer than `one_of` values, there are as many more combinations.
    """
    assert len(parameters) > 2
    one_of = min(one_of, *map(len, parameters.values()))
    numbered = (enumerate(values.items()) for values in parameters.values())
    met = [
        pytest.param(*(value for _, (_, value) in chosen), id="-".join(label for _, (label, _) in chosen))
        for chosen in itertools.product(*numbered)
        if sum(number for number, _ in chosen) % one_of == 0
    ]
    return pytest.mark.parametrize(tuple(parameters), met)
