"""A model larger than its memory limit: seconds per token of every way to run it, under the same memory group.

The work is done by `benchmarks.harness.campaign`; `python -m benchmarks offload-limit` runs the same without pytest.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.campaign import ALL, Campaign, available
from benchmarks.harness.cgroup import unavailable_reason

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GIB = 1 << 30
CASES = (
    pytest.param("llama-2.7GB", GIB, ALL, id="llama-2.7GB-1GiB"),
    pytest.param("llama-thin-tied", GIB, ALL, id="llama-thin-tied-1GiB"),
    # More memory, same model: only the law (streamed bytes / bandwidth) is at stake, so no rival but the compute floor.
    pytest.param("llama-2.7GB", GIB * 3 // 2, ("torchwrap", "memory"), id="llama-2.7GB-1.5GiB"),
)


@pytest.mark.parametrize(("shape", "limit", "names"), CASES)
def test_decode_under_a_memory_limit(
    shape: str, limit: int, names: tuple[str, ...], compare: Any, results: dict[str, dict[str, Any]], rounds: int, benchmark: Any
) -> None:
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    campaign = Campaign(shape=shape, limit=limit, names=available(names))
    campaign.prepare()
    others = [name for name in campaign.names if name != "torchwrap"]
    compare(
        lambda: campaign.run("torchwrap"),
        {name: lambda name=name: campaign.run(name) for name in others},
        rounds=rounds,
        group=campaign.title,
    )
    summary = campaign.summary()
    results[campaign.title] = summary
    benchmark.extra_info.update({key: summary[key] for key in ("decode_ratio", "prefill_ratio", "prediction", "physics")})
    assert summary["equal_tokens"], "contenders computed different tokens"
    assert summary["contenders"]["torchwrap"]["peak_bytes"] <= limit
