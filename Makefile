# Everything runs in a virtual environment that is made on demand: VENV=elsewhere puts it elsewhere.
VENV ?= .venv
RECIPE ?= recipes/dph_rl/countdown3.yaml
BIN := $(VENV)/bin
# Tests share a machine: two workers, one thread each.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install run test lint bench rehearse clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: ## make or update the virtual environment
	@scripts/install.sh --dev $(VENV)

run: install ## train, evaluate and compare RECIPE (default: DPH-RL on countdown3); goes on where it stopped
	$(BIN)/posttrain run $(RECIPE) --resume

test: install ## the test suite, without the slow and GPU tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: install ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install ## steps, preferences, teachers and rewards against TRL, engines against vLLM, programs per sandbox
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.preference
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.teacher
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engines
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rewards
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sandbox

rehearse: ## the lines of docker/Dockerfile.cpu without a Docker engine (as root, with debootstrap)
	docker/rehearse.py

clean: ## remove the virtual environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
