# The commands of a checkout. `make` alone lists them. Each one makes what it needs, .venv included.

PYTHON ?= python3
JOBS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/stamp
PYTEST := TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q
# JOBS processes with one thread each: torch would otherwise start a thread per core in every one of them.
PARALLEL := -n $(JOBS)
CODE := src tests $(wildcard scripts benchmarks)

.PHONY: help demo demo-vision test test-all check fix bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## the whole pipeline on an embedded model and data set, offline
	$(BIN)/loralab demo

demo-vision: $(STAMP) ## the same with questions about pictures
	$(BIN)/loralab demo --vision --output runs/demo-vision

test: $(STAMP) ## all tests but the slow ones and those that need a GPU
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not slow and not gpu"

test-all: $(STAMP) ## all tests; those that need a GPU are skipped where there is none
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not gpu"
	$(PYTEST) -m gpu || test $$? -eq 5  # 5: no such tests

check: $(STAMP) ## lint, format, types and architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/architecture

fix: $(STAMP) ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## tokens per second against peers, on the demo's model and rows; more: benchmarks/throughput.py --help
	$(BIN)/python benchmarks/throughput.py

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's own output is cut down to the lines that show that it moves on; its errors come through whole.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "loralab needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "fix: name one that is, for example: make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv .venv || { \
	    echo "fix: install Python's venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi
	@echo "installing into .venv: on Linux about 6.5 GB with PyTorch, some minutes the first time"
	@$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' \
	  | awk '/^ *Downloading|^Building|^Installing/ { print substr($$0, 1, 110); fflush() }'
	@touch $@
