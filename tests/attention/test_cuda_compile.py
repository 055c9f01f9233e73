"""The kernels compiled for every target without a card, and what the machine code shows: tensor cores, shuffles, no spilled registers.

What this cannot show is time. Targets before sm_75 end with CUDA 12; the wheel that the tests install is the last of those.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.attention import cuda_sass
from torchwrap.attention.cuda import nvrtc, variants
from torchwrap.attention.cuda.variants import Family, Variant
from torchwrap.core.errors import KernelError

WIDTHS = variants.HEAD_WIDTHS
NATIVE: dict[Family, int] = {"volta": 70, "turing": 75}
TARGETS = (70, 72, 75, 80, 86, 89, 90, 120)
pytestmark = pytest.mark.skipif(nvrtc.unavailable(70) is not None, reason=str(nvrtc.unavailable(70)))


def kernels(family: Family, width: int, capped: bool) -> list[Variant]:
    return [
        variants.forward(family, width, capped),
        variants.split(family, width, capped),
        variants.backward_rows(family, width, capped),
        *variants.backward_keys(family, width, capped),
    ]


def name_of(variant: Variant) -> str:
    split = " split" if variant.key_warps > 1 else ""
    return f"{variant.family} {variant.width} {variant.entry}{split}{' capped' if variant.capped else ''} {variant.outputs}"


ALL = [kernel for family in NATIVE for width in WIDTHS for kernel in [*kernels(family, width, False), variants.combine(family, width)]]
# One width of each with the cap; it is the one that has the least registers to spare.
ALL += [kernel for family in NATIVE for kernel in kernels(family, 128, True)]


@pytest.mark.parametrize("variant", ALL, ids=map(name_of, ALL))
def test_a_kernel_uses_tensor_cores_and_spills_nothing(variant: Variant) -> None:
    made = nvrtc.compile_variant(variant, NATIVE[variant.family])
    said = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", made.log)
    registers, shared = re.search(r"Used (\d+) registers", made.log), re.search(r"(\d+) bytes smem", made.log)
    assert said and said.groups() == ("0", "0"), made.log
    assert registers and int(registers[1]) <= 255
    assert (int(shared[1]) if shared else 0) <= variant.shared_bytes <= 48 << 10

    found = cuda_sass.counts(made.cubin)
    assert found["LDL"] == found["STL"] == 0
    steps = [found[f"HMMA.884.STEP{step}"] for step in range(4)]
    if variant.entry == "combine":
        assert not any(steps) and not found["HMMA"]
    elif variant.family == "volta":
        assert steps[0] > 0 and len(set(steps)) == 1 and found["HMMA"] == found["LDSM"] == 0
    else:
        assert found["HMMA"] > 0 and found["LDSM"] > 0 and not any(steps)


PROBE = b"""
#include "tiles.cuh"
KERNEL(THREADS) probe(const Params p) {
    SHARED uint4 tile[32 * UNITS];
    load_tile<32>(tile, p.v, 0, 0, 0, 0, 32);
    barrier();
    float sums[UNITS][VALUES] = {}, weights[4][VALUES];
    UNROLL for (int n = 0; n < 4; ++n) UNROLL for (int i = 0; i < VALUES; ++i) weights[n][i] = p.lse[(n * VALUES + i) * 32 + lane_id()];
    multiply_values(sums, weights, tile, 0);
    store_rows(p.out, 0, 0, 0, ROWS, sums, 1.0f);
}
"""


def probe(family: Family, arch: int) -> bytes:
    """O += P V of one warp alone: 4 tiles of P, 64 columns of V."""
    options = (f"-D{family.upper()}", "-DHEAD=64", "-DROW_WARPS=1", "-DKEY_WARPS=1", "-DKEYS=32", "-DSOFTCAP=0")
    return nvrtc.compile_source("probe.cu", PROBE, arch, options).cubin


def test_volta_takes_four_steps_for_each_product_and_two_shuffles_for_each_tile() -> None:
    found = cuda_sass.counts(probe("volta", 70))
    products = 4 * 2 * 8  # tiles of P, steps of k in each, tiles of V
    assert {step: found[f"HMMA.884.STEP{step}"] for step in range(4)} == dict.fromkeys(range(4), products)
    assert found["SHFL"] == 2 * 4
    assert found["LDL"] == found["STL"] == 0


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_turing_takes_one_instruction_for_each_product_and_no_shuffle(arch: int) -> None:
    found = cuda_sass.counts(probe("turing", arch))
    assert found["HMMA"] == 4 * 8 and found["LDSM"] == 4 * 2 and found["SHFL"] == 0


@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch >= 75])
def test_turings_instruction_is_native_on_every_later_card(arch: int) -> None:
    for variant in (variants.forward("turing", 64, False), variants.split("turing", 128, False)):
        found = cuda_sass.counts(nvrtc.compile_variant(variant, arch).cubin)
        assert found["HMMA"] > 0 and found["LDSM"] > 0


@pytest.mark.parametrize("arch", TARGETS)
def test_voltas_instruction_is_native_up_to_turing_and_emulated_later(arch: int) -> None:
    found = cuda_sass.counts(probe("volta", arch))
    assert bool(found["HMMA.884.STEP0"] or found["HMMA.884.STEP1"]) == (arch < 80)


def test_backward_compiles_for_later_cards() -> None:
    for variant in (variants.backward_rows("turing", 64, False), *variants.backward_keys("turing", 64, False)):
        assert cuda_sass.counts(nvrtc.compile_variant(variant, 90).cubin)["HMMA"] > 0


@pytest.mark.parametrize(("family", "arch"), NATIVE.items())
def test_the_counts_are_those_of_the_disassembler(tmp_path: Path, family: Family, arch: int) -> None:
    program = cuda_sass.disassembler()
    if program is None:
        pytest.skip("no nvdisasm: set TORCHWRAP_NVDISASM to one of CUDA 12, such as that of the triton 3.6 wheel")
    cubin = nvrtc.compile_variant(variants.forward(family, 64, False), arch).cubin
    theirs = cuda_sass.disassembled(cubin, tmp_path, program)
    if isinstance(theirs, str):
        pytest.skip(f"{program} does not read sm_{arch}: {theirs}")
    assert cuda_sass.counts(cubin) == theirs


def test_a_source_that_does_not_compile_is_refused_with_the_compilers_words() -> None:
    with pytest.raises(KernelError, match=r"(?s)sm_70.*identifier .nonsense. is undefined"):
        nvrtc.compile_source("bad.cu", b"__global__ void k() { nonsense; }", 70, ())
