# `make demo` and `make test` are all that a newcomer needs; `make help` lists the rest.
# Each builds .venv where it is missing or older than what it is built from.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n 2 --dist worksteal
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)

# The gpu-* targets use the system's Python as it is, and no network.
GPU_PYTHON ?= python3
GPU_ARCHS ?= 90a-real
GPU_WHEELS ?=
RESULTS_DIR ?= gpu-results

.PHONY: help $(VENV) demo test test-more bench cpu-tune lint clean
.PHONY: gpu-build gpu-test gpu-sanitize gpu-bench gpu-tune

help:  ## this list
	@sed -nE 's/^([.a-z$$(){}A-Z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) \
	  | sed 's/$$(VENV)/$(VENV)/' | column -t -s '|'

$(VENV): $(VENV)/.built  ## the environment alone

$(VENV)/.tools: pyproject.toml
	@echo "Building $(VENV): a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq $(TORCH) 'setuptools>=77' wheel pybind11 cmake ninja
	@PYFASTFT_CUDA=0 $(BIN)/python -m pip install -qq --no-build-isolation \
	  $(TORCH) -e '.[demo,lint,peers,test]'
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	@echo "Compiling the extensions"
	@$(BIN)/python -m pip install -qq --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.peft-suite: $(VENV)/.built
	@$(BIN)/python -m pip install -qq --no-build-isolation $(TORCH) -e '.[peft-suite]'
	@touch $@

demo: $(VENV)/.built  ## fine-tune a vision transformer: table and plot
	@$(BIN)/python -m pyfastft demo

test: $(VENV)/.built lint  ## lint and the tests that take minutes at most
	@$(PYTEST) $(PARALLEL) -q -m 'not more and not slow and not gpu'

test-more: $(VENV)/.built $(VENV)/.peft-suite  ## the heavier tests
	@$(PYTEST) $(PARALLEL) -q -m 'more and not slow and not gpu'

bench: $(VENV)/.built  ## measure against the peers
	@$(BIN)/python -m pyfastft bench

cpu-tune: $(VENV)/.built  ## measure where torch's GEMM is the faster one; PYFASTFT_DETERMINISTIC=0 uses it
	@$(BIN)/python -m pyfastft.benchmarks.tune --family lora --device cpu

lint: $(VENV)/.built  ## ruff, mypy and clang-format
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/mypy --no-error-summary
	@find csrc -type f ! -name '*.md' -print0 | xargs -0 $(BIN)/clang-format --dry-run -Werror

clean:  ## remove what was built; the environment stays
	@rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@rm -f pyfastft/*.so pyfastft/_build_info.json $(VENV)/.built
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

NEEDED_ON_GPU := torch triton numpy safetensors tqdm setuptools wheel pybind11 pytest

gpu-build:  ## the extensions for this machine's GPU; GPU_WHEELS=folder brings what is missing
	@if [ -n '$(GPU_WHEELS)' ]; then \
	  $(GPU_PYTHON) -m pip install -qq --no-index --no-deps $(GPU_WHEELS)/*.whl; fi
	@$(GPU_PYTHON) -c 'import sys, importlib.util as u; \
	  missing = [n for n in "$(NEEDED_ON_GPU)".split() if not u.find_spec(n)]; \
	  sys.exit(f"gpu-build: $(GPU_PYTHON) lacks {missing}, set GPU_WHEELS" if missing else 0)'
	@mkdir -p $(RESULTS_DIR)
	@PYFASTFT_CUDA=1 PYFASTFT_CUDA_ARCHS=$(GPU_ARCHS) $(GPU_PYTHON) -m pip install \
	  --no-index --no-build-isolation --no-deps -v -e . > $(RESULTS_DIR)/build.log 2>&1 \
	  || { tail -n 40 $(RESULTS_DIR)/build.log; exit 1; }
	@cp build/cmake-*-cuda/_cuda.log $(RESULTS_DIR)/ptxas.log
	@$(GPU_PYTHON) -m pyfastft | tee $(RESULTS_DIR)/machine.txt

gpu-test:  ## the tests on this machine's GPU
	@mkdir -p $(RESULTS_DIR)
	@env -u TRITON_INTERPRET $(GPU_PYTHON) -m pytest -q -n 4 --dist worksteal \
	  -m 'gpu or not (slow or more)' --junitxml=$(RESULTS_DIR)/test.xml \
	  | tee $(RESULTS_DIR)/test.log

# Without torch's caching allocator, so that one tensor's overflow does not land in another.
gpu-sanitize:  ## compute-sanitizer over the CUDA backend's small samples
	@mkdir -p $(RESULTS_DIR)
	@for tool in memcheck racecheck; do \
	  env -u TRITON_INTERPRET PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	  $(GPU_PYTHON) -m pytest -q -p no:cacheprovider tests/test_registry.py \
	  tests/native/test_cuda_adapter.py -m 'gpu or not more' \
	  -k 'test_registry and test_truth and cuda- or test_engines_on_a_gpu' | tee $(RESULTS_DIR)/$$tool.log; done

gpu-bench:  ## measure one family on this machine's GPU; FAMILY=lora
	@test -n '$(FAMILY)' || { echo 'gpu-bench: set FAMILY, e.g. FAMILY=lora'; exit 2; }
	@mkdir -p $(RESULTS_DIR)
	@$(GPU_PYTHON) -m pyfastft bench --family $(FAMILY) --output $(RESULTS_DIR)

gpu-tune:  ## measure which engine is fastest on this machine's GPU, write its table; FAMILY=lora
	@test -n '$(FAMILY)' || { echo 'gpu-tune: set FAMILY, e.g. FAMILY=lora'; exit 2; }
	@mkdir -p $(RESULTS_DIR)
	@$(GPU_PYTHON) -m pyfastft.benchmarks.tune --family $(FAMILY)
	@cp triton_kernels/_*engine.json $(RESULTS_DIR)/
