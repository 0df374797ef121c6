# Everything runs in .venv, which the first target makes from nothing: python3 >= 3.11 is all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What builds the documentation lives apart, so that it changes nothing of what is tested.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
# Options for pytest, e.g. make test ARGS="tests/cache -k codec"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install browser demo test lint format types imports docs check cluster-check bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

install: $(STAMP) ## Make .venv with everything that the checks need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Preprocess, train and generate with a tiny model, on this machine
	$(BIN)/python -m ray_diffsynth demo

# Debian's package, if this is root on a machine that has apt-get; the tests that need it are skipped without.
browser: ## Install Chromium for the tests that look at report.html
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	     timeout 300 apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	|| echo "no chromium: the tests that look at report.html in a browser are skipped"

# One thread a process: the suite runs several processes on few cores. Tests on Ray wait a lot for processes to start, so two
# files at a time are run, each by one process with a Ray of its own.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) browser ## Run all tests (those marked gpu are skipped without CUDA)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

# PLW1514: text files are opened as UTF-8, whatever the terminal's encoding is; a rule that ruff has as a preview.
lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 ray_diffsynth jobs cluster benchmarks
	for finding in findings/*.sh; do bash -n $$finding || exit 1; done
	$(BIN)/ruff format --check .

format: $(STAMP) ## Repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## Check types (mypy strict)
	$(BIN)/mypy

imports: $(STAMP) ## Check that imports go down only
	$(BIN)/lint-imports

# No page is fetched from elsewhere, in the build or by the reader's browser.
docs: $(DOCS_STAMP) ## Build the documentation's site into build/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: $(PYTHON) -m http.server -d build/site"

$(DOCS_STAMP): docs_site/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet -r docs_site/requirements.txt
	@touch $@

check: lint types imports ## All checks but the tests

# make cluster-check FILE=my_cluster.yaml CRDS=folder; without FILE all of cluster/
cluster-check: FILE ?= $(wildcard cluster/kuberay/*.yaml cluster/launcher/*.yaml cluster/skypilot/*.yaml cluster/slurm/*.sbatch)
cluster-check: $(STAMP) ## Say what is wrong in FILE, of KubeRay, ray up, SkyPilot or Slurm
	@$(BIN)/python -m cluster.check $(FILE) $(if $(CRDS),--crds $(CRDS))

bench: $(STAMP) ## Run the benchmarks, one file a claim, and print one table
	$(BIN)/python -m benchmarks.run $(ARGS)

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(DOCS_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
