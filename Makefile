# make train | make test from a clean checkout. A second call reuses the environment.
PYTHON ?= python3
VENV ?= .venv
NPROC ?= 2
JOBS ?= 2
ARGS ?=
PIP_ARGS ?=
# One BLAS thread a test; the engine sets its own number of threads when it trains.
export OMP_NUM_THREADS = 1
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed

.PHONY: setup train test lint docs bench parity kernels clean

setup: $(SETUP)

$(SETUP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megalite needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test,dev]'
	@touch $@

train: $(SETUP)
	$(BIN)/megalite train --nproc-per-node $(NPROC) experiment=quickstart $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache

docs: $(SETUP)
	$(BIN)/python -m megalite.config.docs

bench: $(SETUP)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/throughput.py $(ARGS)

# Every layout of 2, 4 and 8 ranks, and docs/parity.md; goes on where it stopped. ARGS="--world 8 --slice 1/4"
parity: $(SETUP)
	$(BIN)/python -m tests.parity.full --jobs $(JOBS) $(ARGS)

# Every kernel interpreted and compiled for every chip, and docs/kernels.md; on a machine with a GPU: ARGS="--device cuda"
kernels: $(SETUP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m megalite_kernels.validate $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
