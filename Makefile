# Two commands on a fresh machine do all the set-up: `make run` and `make test`.
PYTHON ?= python3
# The exact pin chooses the CPU build; on a GPU machine: make setup TORCH='torch>=2.11'
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A user's machine has other versions of what the server needs too, so clients have an environment of their own.
CLIENTS := .venv-clients
NODE := tests/e2e/node
export OMP_NUM_THREADS ?= 1
# Test files run side by side, each whole in one process.
WORKERS ?= 2

.PHONY: help setup run test check clients bench clean

help: ## what each target does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## make .venv with pinned versions

$(READY): pyproject.toml requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m pyrosome.ops.native
	touch $(READY)

run: $(READY) ## ask the built-in model about a document, and see where its indexer looked
	$(BIN)/pyrosome ask builtin:ledger "? falcon"

test: $(READY) ## the default test run: no GPU, no network, no weights
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(READY) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clients: $(CLIENTS)/.ready $(NODE)/node_modules/.ready ## clients by others, which PYROSOME_CLIENTS=1 make test talks to

$(CLIENTS)/.ready: requirements/clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r requirements/clients.txt
	touch $@

# What is locked is installed as it is locked.  `npm ci` would refuse: a registry may lack packages for other systems.
$(NODE)/node_modules/.ready: $(NODE)/package.json $(NODE)/package-lock.json
	cd $(NODE) && npm install --no-save --no-progress
	touch $@

bench: $(READY) ## rates and memory by context, then docs/performance.md; bench/README.md has the comparisons
	$(BIN)/python -m bench.frontier
	$(BIN)/python -m bench.report

clean: ## remove what set-up made
	rm -rf $(VENV) $(CLIENTS) $(NODE)/node_modules build dist src/*.egg-info
