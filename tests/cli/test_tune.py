"""tune measures shapes and keeps what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Done

SHAPE = ("--heads", "2", "--kv-heads", "1", "--width", "8", "--tokens", "16", "--device", "cpu")


def test_each_number_of_tokens_is_a_prefill_and_a_decode(cli: Callable[..., Done], tmp_path: Path) -> None:
    found = cli("tune", *SHAPE, "--train", "--tune-dir", tmp_path, "--json").data["measured"]
    assert [(one["kind"][0], one["kind"][2]) for one in found] == [
        ("forward", "prefill"), ("backward", "prefill"), ("forward", "decode"), ("backward", "decode"),
    ]  # fmt: skip
    assert all(set(one["order"]) == set(one["seconds"]) == {"cpu", "sdpa"} for one in found)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_text_marks_the_first_choice(cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli("tune", *SHAPE, "--tune-dir", tmp_path)
    assert done.status == 0 and done.out.count("*") == 3 and "ms" in done.out


def test_a_wrong_argument_is_named(cli: Callable[..., Done], tmp_path: Path) -> None:
    assert "'many' is not a list of numbers" in cli("tune", "--tokens", "many").err
    assert "'fastest' is unknown" in cli("tune", *SHAPE, "--backends", "fastest", "--tune-dir", tmp_path).err
