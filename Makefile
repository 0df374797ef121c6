# Everything runs in .venv, which the first target makes from nothing: python3 >= 3.11 is all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Options for pytest, e.g. make test ARGS="tests/cache -k codec"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types imports check bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(STAMP) ## Make .venv with everything that the checks need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Preprocess, train and generate with a tiny model, on this machine
	$(BIN)/python -m ray_diffsynth.demo.run

# One thread a process: the suite runs several processes on few cores.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) ## Run all tests (those marked gpu are skipped without CUDA)
	$(BIN)/python -m pytest -q --durations=15 $(ARGS)

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types (mypy strict)
	$(BIN)/mypy

imports: $(STAMP) ## Check that imports go down only
	$(BIN)/lint-imports

check: lint types imports ## All checks but the tests

bench: $(STAMP) ## Run the benchmarks, one file a claim
	@for file in $(sort $(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## Remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
