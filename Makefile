# For users:
#
#     make quickstart    train a small model from end to end (a few minutes on two cores); pictures and numbers in quickstart-out/
#     make test          all checks: lint, types, documentation, unit, distributed and integration tests
#     make docs          the documentation as a site, in site/; fails on a dead link
#
# Both create a virtual environment in .venv and install what they need on first use.
#
#     PYTHON  interpreter for .venv, 3.10 to 3.13             make test PYTHON=python3.12
#     TORCH   what to pip install if .venv has no torch yet   make test TORCH="torch==2.11.0"
#     ARGS    more options for the quickstart                 make quickstart ARGS="--data groups.jsonl --steps 50"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Test processes side by side; the tests start further processes of their own.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint typecheck docs pytest

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^Test processes/,$$d'

quickstart: $(VENV)/installed
	$(BIN)/python -m examples.quickstart.run $(ARGS)

test: lint typecheck docs pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

typecheck: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Files stay whole, as tests of one share what they prepare; in order, as the folders with long tests come first.
pytest: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The stamps are newer than what they were made from, so that a second run installs nothing.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); name a Python 3.10 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "make: $$($(PYTHON) --version) is not supported; name a Python 3.10 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet $(TORCH)
	@touch $@

$(VENV)/installed: setup.py $(VENV)/torch
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: setup.py $(VENV)/torch
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/installed
