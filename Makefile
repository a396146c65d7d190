# `make` lists the targets. Everything runs in the environment .venv, which each target makes or updates as it needs.
# PYTHON=... picks the interpreter for it, ARGS=... adds arguments for pytest (make test-fast ARGS="-k boxes").

PYTHON ?=
ARGS ?=
RUN := .venv/bin/python
ENVIRONMENT = python=$$(PYTHON="$(PYTHON)" ./setup/prerequisites) && PYTHON="$(PYTHON)" "$$python" setup/environment.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help bench demo setup dev horovod test test-fast test-long mutants lint format lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: setup ## generate shapes, train a small model on them, evaluate it, draw its predictions
	$(RUN) -m examples.demo

test: dev horovod lint ## lint and all tests but the longest
	$(RUN) -m pytest $(ARGS)

test-fast: dev ## the quick unit tests, for daily work (no Horovod)
	$(RUN) -m pytest -m "not slow and not long" $(ARGS)

test-long: dev horovod ## the tests that are too long for every run
	$(RUN) -m pytest -m long $(ARGS)

mutants: dev horovod ## plant the faults of tests/mutants.txt one by one: do the tests notice (hours; ARGS=modeling/rpn.py)
	$(RUN) -m tools.mutants $(ARGS)

lint: dev ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: dev ## fix style and formatting where ruff can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

setup: ## make or update .venv for training and prediction
	@$(ENVIRONMENT)

dev: ## setup, and what tests need
	@$(ENVIRONMENT) dev

horovod: ## setup, and Horovod (built from source once, then from a cache)
	@$(ENVIRONMENT) horovod

bench: setup ## measure speed beside torchvision (installs PyTorch)
	$(RUN) -m pip install --quiet -r requirements/bench.txt -c requirements/constraints.txt
	$(RUN) -m tools.benchmark --vs torchvision --precision float32 bfloat16 --batch 1 2 $(ARGS)

lock: dev ## renew requirements/constraints.txt (a failure leaves the old file)
	$(RUN) setup/lock.py >requirements/constraints.new
	mv requirements/constraints.new requirements/constraints.txt
