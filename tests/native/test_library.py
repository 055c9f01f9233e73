"""The shared library is there when it could be built, says what it is, and says why when it is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from tests.native.cases import Case
from torchwrap import native
from torchwrap.core.errors import UnsupportedModelError
from torchwrap.native import library

needs_kernels = pytest.mark.skipif(not native.available(), reason=native.reason())


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_machine_with_a_compiler_has_the_kernels() -> None:
    assert native.available(), f"{native.reason()}; {library.BUILD}"


@needs_kernels
def test_description_names_compiler_instruction_set_and_file() -> None:
    found = native.describe()
    assert set(found) == {"path", "compiler", "instruction_set", "threads"}
    assert found["instruction_set"] == next(iter(native.instruction_sets()))
    assert str(found["compiler"]).startswith(("gcc", "clang"))
    assert "baseline" in native.instruction_sets()


@needs_kernels
def test_products_of_bfloat16_come_first_where_the_processor_is_fast_at_them() -> None:
    names = list(native.instruction_sets())
    assert names[-1] == "baseline"
    if {"avx512", "avx512_bf16"} <= set(names):
        with open("/proc/cpuinfo") as lines:
            intel = any("GenuineIntel" in line for line in lines)
        assert names[:2] == (["avx512", "avx512_bf16"] if intel else ["avx512_bf16", "avx512"])


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_missing_library_is_told_and_refused(content: bytes | None, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "kernels.native.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "PATH", path)
    library._load.cache_clear()
    try:
        assert not native.available()
        assert native.reason() and native.describe()["reason"] == native.reason()
        assert native.instruction_sets() == {}
        with pytest.raises(UnsupportedModelError, match="not available"):
            native.decode(**Case().tensors())  # type: ignore[arg-type]
    finally:
        library._load.cache_clear()


@needs_kernels
def test_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", -1)
    library._load.cache_clear()
    try:
        assert "other sources" in native.reason()
    finally:
        library._load.cache_clear()


@needs_kernels
@pytest.mark.parametrize("best", list(native.instruction_sets()))
def test_the_environment_names_the_best_instruction_set_that_is_taken(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(native.instruction_sets())
    expected = native.instruction_sets()[best]
    monkeypatch.setenv(library.BEST, best)
    library._load.cache_clear()
    try:
        assert native.available() and native.describe()["instruction_set"] == best
        assert list(native.instruction_sets()) == names[names.index(best) :]
        assert library.number_of(None) == expected
    finally:
        library._load.cache_clear()


@needs_kernels
def test_an_instruction_set_that_is_none_is_told_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.BEST, "avx3")
    library._load.cache_clear()
    try:
        assert not native.available() and native.instruction_sets() == {}
        assert "'avx3'" in native.reason() and "baseline" in native.reason()
        with pytest.raises(UnsupportedModelError, match=library.BEST):
            library.library()
    finally:
        library._load.cache_clear()


@needs_kernels
def test_threads_come_from_the_openmp_that_torch_uses() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    assert native.describe()["threads"] == "torch's OpenMP"
    # In a process of its own: other packages bring copies of OpenMP too.
    code = """
from tests.native.cases import Case
from torchwrap import native
native.decode(**Case().tensors())
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}))
"""
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == 1


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_reads_every_word_once(threads: int) -> None:
    words = torch.arange(100_003)
    assert library.library().torchwrap_read(words.data_ptr(), words.numel(), threads) == int(words.sum())


@needs_kernels
def test_several_threads_may_call_at_once() -> None:
    cases = [Case(keys=3000, seed=seed, dtype=torch.bfloat16) for seed in range(4)]
    wanted = [native.decode(**case.tensors())[0] for case in cases]  # type: ignore[arg-type]
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        arguments = cases[number].tensors()
        found[number] = [torch.equal(native.decode(**arguments)[0], wanted[number]) for _ in range(10)]  # type: ignore[arg-type]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == {number: [True] * 10 for number in range(4)}


@needs_kernels
def test_forked_child_computes_the_same() -> None:
    # In a process of its own: pytest's has threads that nobody should fork.
    code = """
import json, os, torch
from tests.native.cases import Case
from torchwrap import native
from torchwrap.native.decode import run
arguments = Case(keys=9000).tensors()
scale, _ = arguments.pop("scale"), arguments.pop("softcap")
def once():
    return run(*arguments.values(), scale, 0.0, None, 2)[0]
before = once()
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, json.dumps([torch.equal(once(), before), native.describe()["threads"]]).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 1000).decode())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [True, "own threads"]


@needs_kernels
def test_spawned_process_loads_it_too() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(native.available)
