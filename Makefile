# `make demo` and `make test` need nothing but Python 3.11-3.13: the first run makes $(VENV) and installs into it.
#
#   make test PYTHON=python3.12                  another interpreter
#   make demo TORCH=torch==2.9.1 TORCHVISION=torchvision==0.24.1      other builds, reinstalled when they change

PYTHON ?= python3
VENV ?= .venv
# Installed first and in one call: resolved on its own, torchvision or an open range could bring in another torch build.
TORCH ?= torch==2.14.1
TORCHVISION ?= torchvision==0.29.1
DEMO_ARGS ?=
# Of `make test-runtimes`, such as 'ncnn mnn --share'.
RUNTIMES_ARGS ?=
# Test processes side by side; each needs up to 3 GiB.
JOBS ?= 2
PYTEST_ARGS ?=

# Two libraries with a thread each per core slow small networks down many times on a busy machine.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WANTED := $(VENV)/.torch
CHECKED := graphprune models tools

.DEFAULT_GOAL := help
.PHONY: help install demo test test-runtimes check lint types docs format clean FORCE
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make the virtual environment and install everything into it

demo: $(STAMP) ## train, prune, fine-tune, export and benchmark a small network (under three minutes)
	$(BIN)/python -m tools.demo $(DEMO_ARGS)

test: lint types ## ruff, import contracts, mypy and all tests
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-runtimes: $(STAMP) ## the tests of every runtime, each in an environment of its own in build/runtimes
	$(BIN)/python -m tools.test_runtimes $(RUNTIMES_ARGS) --torch '$(TORCH)' $(if $(TORCHVISION),'$(TORCHVISION)')

check: lint types

lint: $(STAMP) ## ruff, and the contracts on imports
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

types: $(STAMP) ## mypy
	$(BIN)/python -m mypy

docs: $(STAMP) ## the site, into build/docs, offline; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo 'open build/docs/index.html'

format: $(STAMP) ## let ruff fix imports and other things it can fix
	$(BIN)/python -m ruff check --fix .

clean: ## remove what was built, and the virtual environment
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# python3 may be too old: say so before pip fails with something less clear.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "graphprune needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: run make with PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

# Rewritten only when the wanted builds change, so that naming another torch installs it.
$(WANTED): FORCE | $(BIN)/python
	@echo '$(TORCH) $(TORCHVISION)' | cmp -s - $@ || echo '$(TORCH) $(TORCHVISION)' > $@

$(STAMP): pyproject.toml $(WANTED) | $(BIN)/python
	$(BIN)/python -m pip install '$(TORCH)' $(if $(TORCHVISION),'$(TORCHVISION)')
	$(BIN)/python -m pip install -e '.[test,docs]'
	@touch $@
