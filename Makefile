# Two commands do everything: `make train` and `make test`. Each sets .venv up if it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FIXTURES_VENV := .venv-fixtures
SOURCES := $(wildcard models/kernels/csrc/* parallel/collectives/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint fixtures clean

help: ## Show what each target does
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done ## Make .venv with pinned versions and compile the C++ operators

$(VENV)/.done: constraints.txt requirements.txt setup.py pyproject.toml models/kernels/build.py $(SOURCES)
	@command -v g++ > /dev/null || echo "setup: g++ is missing; Busway will run on plain operators, slower"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt pytest ruff setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

train: setup ## Train the built-in recipe
	$(BIN)/busway train

test: setup lint ## Run every fast test (under 15 minutes)
	$(BIN)/python -P -m pytest

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -P -m pytest -m slow

lint: setup ## Run ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fixtures: ## Make the Hugging Face and Megatron fixtures again, in an environment of their own
	test -x $(FIXTURES_VENV)/bin/python || $(PYTHON) -m venv $(FIXTURES_VENV)
	$(FIXTURES_VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/fixtures/requirements.txt
	$(FIXTURES_VENV)/bin/python tests/fixtures/make_huggingface.py
	$(FIXTURES_VENV)/bin/python tests/fixtures/make_megatron.py

clean: ## Remove environments and build products
	rm -rf $(VENV) $(FIXTURES_VENV) build dist *.egg-info models/kernels/*.so parallel/collectives/*.so
