# `make train` and `make test` set everything up by themselves: they need Python 3.11 or later, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The CPU kernels (native/) are built where there is a C++ compiler; everything works without them, only slower.
COMPILER := $(firstword $(foreach name,$(CXX) c++ g++ clang++,$(shell command -v $(name) 2>/dev/null)))
CMAKE = $(or $(shell command -v cmake 2>/dev/null),$(BIN)/uvx cmake)
NATIVE := $(VENV)/.native
NATIVE_SOURCES := $(wildcard native/*.* native/src/*/*.*)
NATIVE_TESTS := build/native-tests

# Where this is set, every process compiles some 1,500 modules anew: 2.5 s of each that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test lint check site native native-test gpu-bundle clean

train: $(READY) $(NATIVE)  ## train Multi-Agent Mamba on Level-Based Foraging until it solves it
	$(BIN)/mam train

test: $(READY) $(NATIVE)  ## run the tests
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## style, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test

site: $(READY)  ## the documentation, in build/site; broken links and unknown references are errors
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site
	@echo 'open build/site/index.html'

native: $(READY)  ## build and install the CPU kernels; `make train` and `make test` do it, and go on if it fails
	@test -n '$(COMPILER)' || echo 'no C++ compiler: going on without the native CPU kernels (slower)'
	@test -z '$(COMPILER)' || { { $(native_install); } && touch $(NATIVE); }

native-test: $(READY)  ## the kernels' own tests, with sanitizers
	@test -n '$(COMPILER)' || echo 'no C++ compiler: the native kernels are not tested'
	@test -z '$(COMPILER)' || { CXX=$(COMPILER) $(CMAKE) -S native -B $(NATIVE_TESTS) -DMAM_NATIVE_TESTS=ON \
		-DMAM_NATIVE_SANITIZE=address,undefined >/dev/null && $(CMAKE) --build $(NATIVE_TESTS) --parallel 2 \
		&& $(NATIVE_TESTS)/test_kernels; }

# For a machine with a GPU that has JAX and the usual scientific packages, and no network: see benchmarks/gpu.py.
GPU_WHEELS := tyro docstring-parser typeguard rich markdown-it-py mdurl tensorboardx equinox jaxtyping wadler-lindig \
	jumanji esquilax jax-tqdm dm-env dm-tree gymnasium farama-notifications jaxmarl gymnax
GPU_PLATFORMS := $(foreach n,28 27 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64

gpu-bundle: $(READY)  ## wheels for Python 3.12 on x86-64 Linux that such a machine may lack, in .wheels (about 4 MB)
	rm -rf .wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(GPU_PLATFORMS) --constraint constraints.txt --dest .wheels $(GPU_WHEELS)
	@echo 'there: python -m pip install --no-index --no-deps --target site .wheels/*.whl, and PYTHONPATH=site:src'

clean:
	rm -rf $(VENV) build

# Built with the pinned versions, too.
native_install = CXX=$(COMPILER) $(BIN)/uv pip install --quiet --python $(BIN)/python --reinstall-package multi-agent-mamba-native \
	--constraint constraints.txt --build-constraint constraints.txt ./native \
	|| CXX=$(COMPILER) PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet \
	--disable-pip-version-check --force-reinstall --no-deps ./native

$(NATIVE): $(READY) $(NATIVE_SOURCES)
	@$(MAKE) --no-print-directory native 2>$(VENV)/native.log \
		|| echo 'the native CPU kernels did not build: going on without them (slower); `make native` says why'
	@touch $@

# Installed again only when the pins change. uv does it in seconds, pip in a minute.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'mam needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip uninstall --quiet --yes mam mam-native 2>/dev/null  # what they were called at first
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
