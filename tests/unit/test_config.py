"""Sizes, field checks, JSON form and migrations of configs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchwrap as tw
from torchwrap.core.config import Config, format_bytes, option, parse_size
from torchwrap.core.errors import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    """Every kind of field."""

    technique: ClassVar[str] = "sample"
    version: ClassVar[int] = 3
    migrations: ClassVar[dict[int, Any]] = {
        1: lambda old: {("budget" if key == "ratio" else key): value for key, value in old.items()},
        2: lambda old: {**old, "budget": old["budget"] / 100},
    }

    budget: float = option(1.0, doc="Fraction kept.", unit="fraction", low=0.0, high=1.0)
    memory: int | str | None = option(None, doc="Memory.", size=True)
    mode: str = option("auto", doc="Way.", choices=("auto", "direct"))
    names: tuple[str, ...] = option((), doc="Names.")
    dtype: torch.dtype | None = option(None, doc="Kind.")  # noqa: RUF009
    device: torch.device | None = option(None, doc="Place.")  # noqa: RUF009
    path: Path | None = option(None, doc="Folder.", machine=True)  # noqa: RUF009
    threads: int = option(0, doc="Threads.", low=0, machine=True)
    keep: bool = option(False, doc="Keep.")

    def validate(self) -> None:
        if self.keep and self.path is None:
            raise ConfigError("keep needs a path", where="Sample.keep")


@given(number=st.integers(0, 10**6), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]), upper=st.booleans())
def test_size_with_unit_is_number_times_unit(number: int, unit: str, space: str, upper: bool) -> None:
    assert parse_size(f"{number}{space}{unit.upper() if upper else unit.lower()}") == number * UNITS[unit]


@given(st.integers(0, 2**63 - 1))
def test_bare_bytes_are_exact(number: int) -> None:
    assert parse_size(number) == parse_size(str(number)) == parse_size(f"{number} B") == number


@pytest.mark.parametrize(
    "value",
    ["", "GiB", "6 gigs", "-1", "1e9", "6GiB extra", "1.5.5GB", "nan", "inf", "\u0661GB", "9" * 5000, -1, 2**63, True, 1.5, None, b"1GB"],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_not_a_size_is_refused_with_the_accepted_units(value: Any) -> None:
    with pytest.raises(ConfigError, match="GiB") as caught:
        parse_size(value, field="Offload.host_memory")
    assert "Offload.host_memory" in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (5 * 2**29, "2.50 GiB"), (-2048, "-2.00 KiB")]
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"budget": 1.5}, "from 0.0 to 1.0 fraction"),
        ({"budget": "all"}, "Sample.budget"),
        ({"budget": float("nan")}, "nan"),
        ({"threads": -1}, "at least 0"),
        ({"threads": True}, "Sample.threads"),
        ({"threads": 1.0}, "Sample.threads"),
        ({"mode": "dierct"}, "Did you mean 'direct'?"),
        ({"memory": "6 gigs"}, "Sample.memory"),
        ({"names": ("a", 1)}, "Sample.names"),
        ({"dtype": "bfloat16"}, "Sample.dtype"),
        ({"keep": True}, "keep needs a path"),
    ],
    ids=str,
)
def test_bad_value_is_named_with_its_field(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sample(**values)
    assert part in str(caught.value) and isinstance(caught.value, ValueError)


def test_values_are_normalised_frozen_and_hashable() -> None:
    config = Sample(memory="1KiB", names=["a"], path=Path("x"))  # type: ignore[arg-type]
    assert (config.memory, config.names, config.path) == (1024, ("a",), "x")
    assert hash(config) == hash(Sample(memory=1024, names=("a",), path=Path("x")))
    with pytest.raises(AttributeError):
        config.budget = 0.5  # type: ignore[misc]


@given(
    budget=st.floats(0, 1), memory=st.none() | st.integers(0, 2**40), mode=st.sampled_from(["auto", "direct"]),
    names=st.lists(st.text(max_size=5)).map(tuple), dtype=st.sampled_from([None, torch.bfloat16, torch.int8]),
    device=st.sampled_from([None, torch.device("cpu"), torch.device("cuda:1")]), threads=st.integers(0, 9),
)
def test_json_form_reads_back_equal_and_is_stable(**values: Any) -> None:
    config = Sample(**values)
    stored = config.to_dict(machine=True)
    assert Sample.from_dict(stored) == config
    assert Sample.from_dict(stored).to_dict(machine=True) == stored


@pytest.mark.parametrize("config", [tw.Trace(), tw.Trace(modules=("a.b",), where="inside")], ids=str)
def test_configs_of_the_library_read_back_equal(config: Config) -> None:
    assert type(config).from_dict(config.to_dict(machine=True)) == config


def test_machine_bound_fields_are_left_out_unless_asked_for() -> None:
    config = Sample(path=Path("/scratch"), threads=3)
    assert not {"path", "threads"} & config.to_dict().keys()
    assert config.to_dict(machine=True)["threads"] == 3


def test_unknown_field_is_named_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'budget'"):
        Sample.from_dict({"bugdet": 1.0})


def test_older_versions_pass_through_every_migration() -> None:
    assert Sample.from_dict({"ratio": 50.0}, version=1) == Sample.from_dict({"budget": 50.0}, version=2) == Sample(budget=0.5)


@pytest.mark.parametrize("version", [0, 4, -1])
def test_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(ConfigError, match="versions 1 to 3"):
        Sample.from_dict({}, version=version)


@pytest.mark.parametrize("value", [{"dtype": "Tensor"}, {"dtype": 1}, {"device": "nowhere"}, {"device": []}], ids=str)
def test_bad_tags_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sample.from_dict({next(iter(value)): value})


def test_every_option_of_the_library_is_documented() -> None:
    assert all(field.metadata["doc"].endswith(".") for field in fields(tw.Trace))


def test_unknown_field_of_a_config_object_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"Offload has no field 'device_memry'\. Did you mean 'device_memory'\?"):
        tw.Offload(device_memry="1GiB")  # type: ignore[call-arg]


def test_wrong_type_names_the_values_that_are_accepted() -> None:
    with pytest.raises(ConfigError, match=r"'four' is of type str \(at Superpipeline\.k\)\. Expected int or 'auto'\."):
        tw.Superpipeline(k="four")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"3 is of type int \(at Sample\.names\)\. Expected tuple\[str, \.\.\.\]\."):
        Sample(names=3)  # type: ignore[arg-type]


def test_size_that_is_none_is_told_an_example() -> None:
    with pytest.raises(ConfigError, match=r"1\.5 is not a size .*\. For example '1\.5GiB'\."):
        tw.Offload(device_memory=1.5)  # type: ignore[arg-type]
