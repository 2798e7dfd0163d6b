# make demo    train a small CNN with and without rules
# make test    the whole test suite
# make quick   the tests that take seconds
# make check   lint, format, types and the whole test suite: what CI runs
# make format  let ruff mend what it can
#
# Each makes the virtual environment it needs, and renews it when pyproject.toml or constraints.txt changed.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# Small models on few cores: one thread per worker, and Inductor compiles in the worker itself.
export OMP_NUM_THREADS ?= 1
export TORCHINDUCTOR_COMPILE_THREADS ?= 1

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo test quick check lint types format
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed-test
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

quick: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

check: lint types test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# .installed-test and .installed-dev: the extra of pyproject.toml by that name is there.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
