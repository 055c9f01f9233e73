"""Medians, quartiles and ratios of repeated measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TypedDict

__all__ = ["Spread", "ratio_of_medians", "spread"]


class Spread(TypedDict):
    """Median and quartiles of `count` values."""

    median: float
    q1: float
    q3: float
    iqr: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and their distance (IQR)."""
    if len(values) < 2:
        only = float(values[0])
        return Spread(median=only, q1=only, q3=only, iqr=0.0, count=1)
    q1, _, q3 = quantiles(values, n=4, method="inclusive")
    return Spread(median=median(values), q1=q1, q3=q3, iqr=q3 - q1, count=len(values))


def ratio_of_medians(rival: Sequence[float], ours: Sequence[float]) -> float:
    """How many times longer the rival takes: above 1 we are faster."""
    return median(rival) / median(ours)
