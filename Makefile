# Everything a person or a build runs. `make help` lists it.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev serve test test-ops test-outside check format bench bench-peers clean

PYTHON ?= python3
TORCH ?= auto
ARGS ?=
BIN := .venv/bin
TASKS := sentiment shakespeare product

help: ## Show what make can do
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  TORCH=auto|cpu|cuda   which build of torch setup installs (default: auto)'
	@echo '  PYTHON=python3.12     which Python makes .venv (default: python3, at least 3.11)'
	@echo '  ARGS="--port 8001"    more options for serve, test, bench and bench-peers; suites for test-outside'

setup: ## Make .venv and install the server and the client into it
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/setup.sh runtime

setup-dev:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/setup.sh dev

serve: setup ## Serve the small built-in base and three example tasks on 127.0.0.1:8000
	@$(BIN)/quickchange-server serve $(foreach task,$(TASKS),--adapter $(task)=adapters/examples/$(task)/adapter) $(ARGS)

test: check ## Check format, lint and types, then run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-ops: setup-dev ## Run the tests that need heavy tools, fetched into .ops (Prometheus, Ray, an image)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -o python_files='ops_*.py' tests/ops $(ARGS)

test-outside: setup-dev ## Run other people's clients, unmodified, each from an environment in .outside
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.outside.run $(ARGS)

check: setup-dev ## Check format, lint and types only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup-dev ## Put the code into the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## Measure throughput and latency of a server that it starts
	$(BIN)/python benchmarks/throughput.py $(ARGS)

bench-peers: setup ## Compare with PEFT, vLLM and llama.cpp, installed into .bench (takes an hour)
	$(BIN)/python benchmarks/peers/compare.py $(ARGS)

clean: ## Remove .venv, .bench, .ops, .outside and everything that was built (not the downloaded base)
	rm -rf .venv .bench .ops .outside dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
