# The only entry points. Each makes .venv if it is missing or out of date; nothing else is needed
# but Python >= 3.10 and make. A C compiler is used where there is one.

PYTHON ?= python3
BIN := .venv/bin
MODEL ?= smollm2
PROMPT ?= What is a paged KV cache good for? Answer in two sentences.

# One thread a process: the test machines are small, and results must not depend on their size.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Test processes beside one another; JOBS=0 runs everything in one. Half of the tests each, then whoever is
# done takes over from the other.
JOBS ?= 2
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: help setup demo test test-full lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       install, get the default model, answer a prompt"
	@echo "make setup      .venv with everything the tests need"
	@echo "make test       the tests that CI runs"
	@echo "make test-full  all tests, the slow ones included"
	@echo "make lint       ruff and mypy"
	@echo "make bench      measure this machine (see docs/performance.md)"
	@echo "make clean      remove .venv, caches and compiled kernels"

setup:
	@$(PYTHON) scripts/setup_env.py dev

demo:
	@$(PYTHON) scripts/setup_env.py demo
	@$(BIN)/python -m octavo.cli.demo "$(MODEL)" --prompt "$(PROMPT)"

test: setup
	$(PYTEST) -m "not slow"

test-full:
	@$(PYTHON) scripts/setup_env.py full
	$(TEST_ENV) $(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/brain.py
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find octavo -name '*.so' -delete -o -name '*.dylib' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
