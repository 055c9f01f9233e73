"""Settings that no technique can go by are refused when they are made, by a typed error that names the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import torchwrap as tw
from torchwrap.core.errors import ConfigError

SIZES = [
    (kind, field) for kind in (tw.Offload, tw.Superpipeline) for field in dataclasses.fields(kind) if field.metadata.get("size")
]


@pytest.mark.parametrize(("kind", "field"), SIZES, ids=[f"{kind.__name__}.{field.name}" for kind, field in SIZES])
def test_only_sizes_with_a_meaning_for_none_take_it(kind: Any, field: dataclasses.Field[Any]) -> None:
    if field.default is None:
        assert getattr(kind(**{field.name: None}), field.name) is None
    else:
        with pytest.raises(ConfigError, match=field.name):
            kind(**{field.name: None})


@pytest.mark.parametrize("technique", [tw.offload, tw.superpipeline], ids=lambda technique: technique.name)
@pytest.mark.parametrize("folder", [None, 3, ["here"]], ids=repr)
def test_what_is_no_path_is_no_folder(technique: Any, folder: Any) -> None:
    with pytest.raises(ConfigError, match="is no path"):
        technique.from_pretrained(folder)
