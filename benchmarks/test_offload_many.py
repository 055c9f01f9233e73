"""Eight sequences through a model larger than its memory limit, together and one after another: tokens per second.

The work is done by `benchmarks.harness.many`; `python -m benchmarks forward-many` runs the same without pytest.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.cgroup import unavailable_reason
from benchmarks.harness.many import ManyCampaign

pytest.importorskip("transformers")

GIB = 1 << 30


def test_eight_sequences_under_a_memory_limit(compare: Any, results: dict[str, dict[str, Any]], rounds: int, benchmark: Any) -> None:
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    campaign = ManyCampaign(shape="llama-2.7GB", limit=GIB)
    compare(
        lambda: campaign.run("together"),
        {way: lambda way=way: campaign.run(way) for way in ("single", "memory")},
        rounds=rounds,
        group=campaign.title,
    )
    summary = campaign.summary()
    results[campaign.title] = summary
    benchmark.extra_info.update({key: summary[key] for key in ("decode_ratio", "all_ratio", "physics")})
    assert summary["equal_tokens"], "the ways computed different tokens"
    assert summary["ways"]["together"]["peak_bytes"] <= campaign.limit
