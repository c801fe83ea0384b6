# Two commands do everything: `make train` and `make test`. Each sets .venv up if it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FIXTURES_VENV := .venv-fixtures
BUILD_LOG := $(VENV)/build.log
SOURCES := $(wildcard models/kernels/csrc/* parallel/collectives/csrc/*)
OPERATORS := models/kernels/_native.so parallel/collectives/_mpi_ops.so
# Those that are missing although a compiler is here: one that was installed after a `make setup` counts.
UNBUILT := $(if $(shell command -v $(CXX) 2> /dev/null),$(filter-out $(wildcard $(OPERATORS)),$(OPERATORS)))

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow layouts layouts-random lint fixtures clean

help: ## Show what each target does
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done ## Make .venv with pinned versions and compile the C++ operators

$(VENV)/.done: constraints.txt requirements.txt setup.py pyproject.toml models/kernels/build.py $(SOURCES) $(UNBUILT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt pytest pytest-xdist ruff setuptools wheel
	rm -f $(OPERATORS)
	$(BIN)/pip install -v --disable-pip-version-check --no-build-isolation --no-deps -e . > $(BUILD_LOG) 2>&1 || { cat $(BUILD_LOG); exit 1; }
	@echo "$$(grep -o 'busway: compiled .*' $(BUILD_LOG)); see $(BUILD_LOG)"
	touch $@

$(UNBUILT): # no recipe: what is missing makes .done run again

train: setup ## Train the built-in recipe
	$(BIN)/busway train

# Two at a time, as much of a run is compiling on one core; a file stays together, as its tests share worlds.
test: setup lint ## Run every fast test (15 minutes, more on slow cores)
	$(BIN)/python -P -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -P -m pytest -m slow

layouts: setup ## Train one model under every layout of tests/layouts/matrix.py and write docs/equality.md
	$(BIN)/python -P -m pytest -m layouts tests/layouts/test_matrix.py --table docs/equality.md

layouts-random: setup ## Train COUNT models under layouts that are drawn by SEED
	$(BIN)/python -P -m pytest -m layouts tests/layouts/test_random.py --seed $(or $(SEED),1) --count $(or $(COUNT),100)

lint: setup ## Run ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fixtures: ## Make the Hugging Face and Megatron fixtures again, in an environment of their own
	test -x $(FIXTURES_VENV)/bin/python || $(PYTHON) -m venv $(FIXTURES_VENV)
	$(FIXTURES_VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/fixtures/requirements.txt
	$(FIXTURES_VENV)/bin/python tests/fixtures/make_huggingface.py
	$(FIXTURES_VENV)/bin/python tests/fixtures/make_megatron.py

clean: ## Remove environments and build products
	rm -rf $(VENV) $(FIXTURES_VENV) build dist *.egg-info $(OPERATORS)
