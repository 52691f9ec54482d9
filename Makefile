# Everything runs in .venv, which `make` sets up by itself. `make help` lists the targets.
PYTHON ?= python3.11
REQUIREMENTS ?= requirements.txt
BIN := .venv/bin
# Busy cores make OpenMP crawl: the tests' small products are faster on one thread.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/installed: requirements.txt requirements-gpu.txt requirements-base.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS) --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/installed ## NMT against kNN-MT with a real model on real text, in under five minutes
	$(BIN)/python train.py experiment=demo

test: .venv/installed ## Run the tests that need no network and no patience (about three minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not network and not gpu"

test-all: .venv/installed ## Run every test, the slow and the downloading ones too
	$(TEST_ENV) $(BIN)/python -m pytest

check: .venv/installed ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed ## Run the benchmarks that need nothing but the catalogue's downloads
	$(BIN)/python -m benchmarks

clean: ## Remove what the tools leave behind (not .venv, outputs or caches of downloads)
	rm -rf .mypy_cache .ruff_cache .pytest_cache build *.egg-info
