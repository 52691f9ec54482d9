# Everything runs in .venv, which `make` sets up. `make help` lists the targets and their settings.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
CANDIDATES := python3 python3.13 python3.12 python3.11
# The first candidate that is Python 3.11 to 3.13.
PYTHON ?= $(firstword $(foreach name,$(CANDIDATES),$(shell $(name) -c '$(FITS)' 2>/dev/null && echo $(name))))
REQUIREMENTS ?= requirements.txt
# Coverage costs a third of the time on Python 3.11, and little later.
COV ?= --cov
BIN := .venv/bin
# On busy cores OpenMP's threads wait for each other; the tests' small products are faster on one.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format docs bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=python3.12                    the interpreter of .venv: Python 3.11, 3.12 or 3.13"
	@echo "  COV=                                 make test without coverage"
	@echo "  REQUIREMENTS=requirements-gpu.txt    faiss for an NVIDIA GPU, in place of faiss-cpu"

.venv/installed: requirements.txt requirements-gpu.txt requirements-base.txt requirements-dev.txt pyproject.toml
	@$(or $(PYTHON),false) -c '$(FITS)' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS) --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/installed ## NMT against kNN-MT with a real model on real text, in under five minutes
	$(BIN)/python train.py experiment=demo

test: .venv/installed ## Run the fast tests, without a network, and report coverage
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not network and not gpu" $(COV)

test-all: .venv/installed ## Run every test, the slow and the downloading ones too
	$(TEST_ENV) $(BIN)/python -m pytest

check: .venv/installed ## Check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/docs/installed: requirements-docs.txt | .venv/installed
	$(BIN)/python -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

docs: .venv/docs/installed ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/python -m mkdocs build --strict --quiet

bench: .venv/installed ## Run the benchmarks that need nothing but the catalogue's downloads
	$(BIN)/python -m benchmarks

clean: ## Remove what the tools leave behind, but not .venv, outputs or downloads
	rm -rf .mypy_cache .ruff_cache .pytest_cache .coverage build site *.egg-info
