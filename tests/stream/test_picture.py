"""What was recorded is drawn: a row for each kind of event, each bar where its event was, marks where they were set."""

from __future__ import annotations

import pytest

from torchwrap.core.errors import ConfigError
from torchwrap.stream.picture import canvas, draw_lanes
from torchwrap.stream.timeline import Event, Lane, Timeline

pytest.importorskip("matplotlib")

STEP: list[tuple[Lane, float, float]] = [
    ("read", 1.0, 2.0),
    ("compute", 2.0, 4.0),
    ("compute", 5.5, 6.0),
    ("backward", 5.0, 8.0),
    ("state", 6.0, 6.5),
    ("update", 6.5, 7.0),
    ("write", 7.0, 7.5),
    ("stall", 8.0, 9.0),
]


def recorded() -> Timeline:
    timeline = Timeline(base_bytes=1 << 20)
    timeline.events += [Event(start, end, lane, "a", 1 << 20) for lane, start, end in STEP]
    timeline.present(1 << 20)
    timeline.mark("forward")
    return timeline


def test_rows_are_those_of_the_events_and_bars_lie_where_the_events_were() -> None:
    axes = canvas(4, 3, 50).subplots()
    draw_lanes(axes, recorded().events, origin=1.0)
    rows = [tick.get_text() for tick in reversed(axes.get_yticklabels())]
    assert rows == ["weights in", "state in", "state out", "compute", "update", "waiting"]
    bars = {}
    for collection in axes.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            row = rows[len(rows) - 1 - int(box.y0)]
            bars.setdefault(row, []).append((box.x0, box.x1))
    assert {row: sorted(spans) for row, spans in bars.items()} == {
        "weights in": [(0.0, 1.0)],
        "compute": [(1.0, 3.0), (4.0, 7.0), (4.5, 5.0)],
        "state in": [(5.0, 5.5)],
        "update": [(5.5, 6.0)],
        "state out": [(6.0, 6.5)],
        "waiting": [(7.0, 8.0)],
    }


def test_rows_without_events_are_left_out_but_for_those_asked_for() -> None:
    axes = canvas(4, 3, 50).subplots()
    draw_lanes(axes, [Event(0.0, 1.0, "save", "a", 1)], origin=0.0)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["compute", "activations", "weights in"]


def test_a_whole_timeline_a_part_and_an_empty_one_are_pictures() -> None:
    timeline = recorded()
    for picture in (timeline.picture(title="all"), timeline.picture(since=2.0, until=6.0), Timeline().picture()):
        assert picture.startswith(b"\x89PNG")
    assert timeline.picture(since=2.0, until=6.0) != timeline.picture()


def test_a_part_without_length_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ConfigError, match="from 3 s to 3 s"):
        recorded().picture(since=3.0, until=3.0)
    with pytest.raises(ConfigError, match="from 99 s"):
        recorded().picture(since=99.0)
