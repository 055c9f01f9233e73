# Every target does its own set-up, once, through a stamp file: `make demo` and `make test` work on a machine that has only Python.
# Plain pip on purpose: it honours a configured local wheel folder, and with torch pinned in constraints.txt it takes the CPU build there.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.10 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.torchwrap-dev
# An environment that lost its interpreter or was copied from elsewhere is made again, whatever its stamp says.
ifneq ($(shell $(BIN)/python -c 'import safetensors' 2>/dev/null && echo whole),whole)
$(shell rm -f $(STAMP))
endif
BENCH_STAMP := $(VENV)/.torchwrap-bench
# pip makes bytecode with one core; below, all of them make it at once.
INSTALL := $(BIN)/python -m pip install -q --no-compile
# Nearly half of all source, of which little or nothing is imported: what is, makes its own.
SELDOM := /(transformers/models|diffusers|networkx|timm|fontTools|pygments|torch/testing|pip|setuptools|mypyc?)/
# Containers say it often. Every process that a test starts would compile the library again, and every worker all tests.
unexport PYTHONDONTWRITEBYTECODE
PYTEST_ARGS ?=
DEMO_ARGS ?=

# One thread per test worker: two workers with two threads each on two cores are slower than two workers with one. Three workers, because
# tests wait for disks and child processes a quarter of the time.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup demo test check lint types public imports docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the main job on a real model: stream SmolLM2-135M under 40 % of its memory, compare, draw the memory timeline"
	@echo "make test   all tests (three workers)"
	@echo "make check  ruff, mypy, public types, import directions, documentation build; with -j2 beside one another"
	@echo "make bench  measure against accelerate, AirLLM and plain memory mapping; needs root for the memory limit"
	@echo "make docs   build the documentation into site/"

$(STAMP): pyproject.toml setup.py $(wildcard torchwrap/native/src/*) constraints.txt requirements/no-deps.txt requirements/vision-no-deps.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10 or newer is needed and none was found; say PYTHON=/path/to/python3" >&2; exit 1; }
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) -c constraints.txt 'setuptools>=77'
# Unpacking takes one core: the kernels are compiled meanwhile. Without a compiler there are none.
	$(BIN)/python setup.py -q build_ext --inplace & \
	TORCHWRAP_NATIVE=0 $(INSTALL) -c constraints.txt -e '.[dev]'; status=$$?; wait; exit $$status
	$(INSTALL) --no-deps -r requirements/no-deps.txt
	$(BIN)/python -m pip uninstall -q -y torchvision timm
	$(INSTALL) --no-deps --upgrade --target $(VENV)/vision -r requirements/vision-no-deps.txt
	$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib $(VENV)/vision || true  # some packages bring files for other versions of Python
	touch $@

$(BENCH_STAMP): $(STAMP) requirements/bench-no-deps.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements/bench-no-deps.txt
	touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m torchwrap.cli demo $(DEMO_ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 3 --dist worksteal --benchmark-disable $(PYTEST_ARGS) tests

check: lint imports types public docs

lint: $(STAMP)
	$(BIN)/ruff check .

imports: $(STAMP)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy -p torchwrap.core -p torchwrap.storage -p torchwrap.stream -p torchwrap.activations -p torchwrap.weights -p torchwrap.optimizer -p torchwrap.offload -p torchwrap.superpipeline -p torchwrap.native -p torchwrap.attention -p torchwrap.fast_attention -p torchwrap.trace -p torchwrap.cli -p torchwrap.demo -p torchwrap.integrations

public: $(STAMP)
	$(BIN)/python .ci/public_types.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(BENCH_STAMP)
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider -p no:xdist $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist site demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info torchwrap/native/*.so
