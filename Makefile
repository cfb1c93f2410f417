# Everything a newcomer needs: `make demo`, then `make test`. Both make the environment they run in.
#
# Needs Python 3.10 or later (another one: PYTHON=python3.12), make, and a package index.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# One test process per usable core: at least 2, so that tests always meet each other, and at most 8,
# for many tests start workers of their own.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell n=$(CORES); [ $$n -ge 2 ] || n=2; [ $$n -le 8 ] || n=8; echo $$n)
# Narrows a test run: make test TESTS="tests/unit -k layers"
TESTS ?=
# More for pytest: make test FLAGS="--reruns 1"
FLAGS ?=

# For test-torch. A plain "torch" may be a build for CUDA, of several GB.
TORCH ?= torch==2.13.0+cpu
TORCH_PATH := build/torch

.PHONY: help demo test test-torch simulate chaos lint format types examples bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       count the words of thousands of files, four ways, side by side"
	@echo "make test       all tests on $(JOBS) processes (JOBS=n; TESTS='tests/unit -k name')"
	@echo "make test-torch collective groups on torch's process groups, with a torch of their own"
	@echo "make simulate   the simulator (SEED=n STEPS=n)"
	@echo "make chaos      a cluster of which everything is killed (MINUTES=10 SEED=n)"
	@echo "make lint       ruff: rules and formatting (make format mends the latter)"
	@echo "make types      mypy on the package, mypy and pyright on tests/typing"
	@echo "make examples   every example, at its full size"
	@echo "make bench      every benchmark (BENCH=pools for one)"
	@echo "make clean      remove the environment and everything built"

# The stamp is touched last, so that an installation cut short is taken up again.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "poolray needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/word_frequencies.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(FLAGS) $(TESTS)

# Tests that need torch, beside the environment, so that all others show that nothing else needs it. Where the
# index has no build for CPUs they skip, and that is said aloud.
test-torch: $(STAMP)
	@test -d $(TORCH_PATH)/torch || $(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(TORCH_PATH) '$(TORCH)' || \
	  echo "test-torch: NOT TESTED with torch: $(TORCH) cannot be had here"
	PYTHONPATH=$(CURDIR)/$(TORCH_PATH) $(BIN)/python -m pytest -n $(JOBS) $(FLAGS) \
	  -k torch tests/integration/test_collective_torch.py tests/contract/test_core_collective.py

simulate: $(STAMP)
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(STEPS),--steps $(STEPS))

MINUTES ?= 10
chaos: $(STAMP)
	$(BIN)/python -m benchmarks.chaos --minutes $(MINUTES) --verbose $(if $(SEED),--seed $(SEED))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pyright is a program for node. The environment holds both as wheels; where there is no such wheel and
# no node either, pyright cannot start, and that is said aloud instead of being taken for a success.
types: $(STAMP)
	$(BIN)/mypy
	@if [ ! -d tests/typing ]; then echo "types: there is no tests/typing to check"; exit 0; fi; set -e; \
	echo "$(BIN)/mypy tests/typing"; $(BIN)/mypy tests/typing; \
	if reason=$$($(BIN)/pyright --version 2>&1 </dev/null); then \
	  echo "$(BIN)/pyright"; $(BIN)/pyright --pythonpath $(BIN)/python; \
	else \
	  echo "types: NOT CHECKED with pyright, because it did not start:"; \
	  echo "$$reason" | tail -n 3 | sed 's/^/types:   /'; \
	fi

examples: $(STAMP)
	@mkdir -p build
	$(BIN)/python examples/word_frequencies.py
	$(BIN)/python examples/streaming_pipeline.py
	$(BIN)/python examples/mandelbrot.py --output build/mandelbrot.png
	$(BIN)/python examples/out_of_core_sort.py --plot build/store.png
	$(BIN)/python examples/hyperparameter_search.py
	$(BIN)/python examples/parameter_server.py
	$(BIN)/python examples/parameter_server.py --asynchronous
	$(BIN)/python examples/web_crawler.py --pages 1000 --crawlers 4
	$(BIN)/python examples/rate_limited_fetcher.py --records 500 --per-second 250

# One question per file; files that begin with an underscore are shared by the others.
BENCH ?= $(filter-out chaos,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))
bench: $(STAMP)
	@set -e; for name in $(BENCH); do echo "== benchmarks/$$name.py"; $(BIN)/python -m benchmarks.$$name; done

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .ruff_cache
