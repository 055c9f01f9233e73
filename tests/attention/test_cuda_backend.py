"""Which calls the back end "cuda_mma" refuses and why, and the cache of compiled kernels. No card is needed: capability is pretended."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cuda import CudaMma, nvrtc, variants
from torchwrap.attention.cuda.backend import unsupported
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import KernelError


def call(width: int = 64, value_width: int | None = None, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    q, k = torch.zeros(1, 2, 3, width, dtype=dtype), torch.zeros(1, 1, 5, width, dtype=dtype)
    return checked(q, k, torch.zeros(1, 1, 5, value_width or width, dtype=dtype), **options)


SEGMENTS = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"dtype": torch.bfloat16}, "fp16, the tensors are bfloat16", id="bf16"),
        pytest.param({"dtype": torch.float32}, "fp16, the tensors are float32", id="fp32"),
        pytest.param({"width": 80}, "64 and 128, q is 80", id="width"),
        pytest.param({"value_width": 128}, "q is 64 and v 128 wide", id="value width"),
        pytest.param({"bias": torch.zeros(3, 5)}, "no bias", id="bias"),
        pytest.param({"dropout": 0.1}, "no dropout, 0.1", id="dropout"),
        pytest.param({"mask": TileMask(1, 3, 5, right=0, chunk=2)}, "has chunk", id="chunk"),
        pytest.param({"mask": TileMask(1, 3, 5, key_mask=torch.ones(1, 5, dtype=torch.bool))}, "has key_mask", id="holes"),
        pytest.param({"mask": TileMask(1, 3, 5, q_segments=SEGMENTS[0], k_segments=SEGMENTS[1])}, "has q_segments", id="segments"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_with_the_reason(options: dict[str, Any], said: str) -> None:
    assert said in str(unsupported(call(**options)))


@pytest.mark.parametrize("mask", [None, TileMask.causal(1, 3, 5), TileMask.padded([4], 3, 5), TileMask(1, 3, 5, left=2, right=1)], ids=repr)
@pytest.mark.parametrize("width", [64, 128])
def test_what_the_kernels_do_is_not_refused(width: int, mask: TileMask | None) -> None:
    assert unsupported(call(width, mask=mask, softcap=5.0, sinks=torch.zeros(2))) is None


def test_tensors_elsewhere_are_refused() -> None:
    assert CudaMma().refuses(call()) == "cuda_mma needs a CUDA device, the tensors are on cpu"


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [
        ((6, 1), None, "tensor cores (compute capability 7.0), this card has 6.1"),
        ((7, 0), "6.2", "this torch is built for ROCm 6.2"),
        ((3, 0), None, "this card has 3.0"),
        ((7, 0), None, None),
    ],
    ids=["Pascal", "ROCm", "Kepler", "Volta"],
)
def test_cards_without_the_instructions_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(nvrtc, "unavailable", lambda _: None)
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    plain = SimpleNamespace(q=elsewhere, width=64, value_width=64, bias=None, dropout=0.0, batch=1, heads=1, mask=None)
    reason = CudaMma().refuses(cast(Call, plain))
    assert reason is None if said is None else said in str(reason)


def test_families_follow_the_compute_capability() -> None:
    capabilities = [(6, 1), (7, 0), (7, 2), (7, 5), (8, 0), (9, 0), (12, 0)]
    assert [variants.family_of(capability) for capability in capabilities] == [None, "volta", "volta", *["turing"] * 4]


def every_variant() -> list[variants.Variant]:
    made: list[Callable[..., Any]] = [variants.forward, variants.split, variants.backward_rows]
    found = []
    for family in ("volta", "turing"):
        for width in variants.HEAD_WIDTHS:
            found += [make(family, width, False) for make in made]
            found += variants.backward_keys(family, width, False)  # type: ignore[arg-type]
    return found


def test_shared_memory_needs_no_permission_of_the_driver() -> None:
    assert {variant: variant.shared_bytes for variant in every_variant() if variant.shared_bytes > 48 << 10} == {}


needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable(75) is not None, reason=str(nvrtc.unavailable(75)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHWRAP_CACHE", str(tmp_path))
    return tmp_path / "cubin"


SMALL = variants.combine("turing", 64)


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_kept_for_its_user_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = nvrtc.binary(SMALL, 75)
    assert made.cubin.startswith(b"\x7fELF") and "registers" in made.log
    (kept,) = folder.iterdir()
    assert os.stat(folder).st_mode & 0o077 == 0
    monkeypatch.setattr(nvrtc, "compile_variant", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.binary(SMALL, 75) == nvrtc.Binary(made.cubin, "")
    assert [kept] == list(folder.iterdir())


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content[:90] + b"x" + content[91:], lambda _: b""])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    made = nvrtc.binary(SMALL, 75)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert nvrtc.binary(SMALL, 75).cubin == made.cubin and kept.read_bytes() == whole


@needs_nvrtc
def test_targets_and_variants_do_not_share_a_file(folder: Path) -> None:
    for variant, arch in ((SMALL, 75), (SMALL, 80), (variants.combine("turing", 128), 75)):
        nvrtc.binary(variant, arch)
    assert len(list(folder.iterdir())) == 3


@needs_nvrtc
def test_a_folder_that_others_can_write_to_is_not_trusted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    assert nvrtc.binary(SMALL, 75).cubin.startswith(b"\x7fELF")
    assert list(folder.iterdir()) == [] and "others may write" in caplog.text


@needs_nvrtc
def test_a_target_the_compiler_does_not_know_is_named(folder: Path) -> None:
    assert "no target sm_30" in str(nvrtc.unavailable(30))
    with pytest.raises(KernelError, match="no target sm_30"):
        nvrtc.binary(SMALL, 30)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    assert "pip install nvidia-cuda-nvrtc-cu12" in str(nvrtc.unavailable(70))
    with pytest.raises(KernelError, match="NVRTC was not found"):
        nvrtc.compile_variant(SMALL, 70)
