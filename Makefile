# Needs only Python >= 3.12 and make: whatever a target wants is installed into .venv first (.ci/bootstrap.py).
#
#   make train      train the small FoX of configs/fox.py on text that is already here; run again to resume
#   make test       contract tests and every fast test
#   make test-all   make test, then the slow ones: faults, training claims, long sweeps
#   make lint       ruff, ruff format --check, mypy
#   make lock       resolve the bounds of pyproject.toml anew into requirements.lock
#   make clean      remove caches and build products (not .venv, not runs/)
#
# ARGS="..." is appended to the command of train, test and test-all; PYTHON=... chooses the interpreter.

VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python -m
ARGS ?=
MORE = $(if $(ARGS), $(ARGS))

# The newest versions within pyproject.toml's bounds, but for these: what the GPU machine has is what we test.
LOCK_PINS := flax==0.12.10 optax==0.2.8

.PHONY: train test test-all lint lock clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

$(STAMP): requirements.lock pyproject.toml .ci/bootstrap.py
	@python=$$(sh .ci/find-python) && "$$python" .ci/bootstrap.py

train: $(STAMP)
	$(RUN) tasks.lm.train --config=configs/fox.py$(MORE)

# Without its bytecode every process of a test would compile the project's modules anew.
test test-all: export PYTHONDONTWRITEBYTECODE :=

# Two at a time: most of a test is one-threaded tracing and compiling.
test: $(STAMP)
	$(RUN) pytest -n 2 --dist worksteal$(MORE)

# Two at a time here, too, but for those that measure speeds.
test-all: test
	$(RUN) pytest -m "slow and not timing" --slow -n 2 --dist worksteal$(MORE)
	$(RUN) pytest -m "timing" --slow$(MORE)

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

lock:
	@python=$$(sh .ci/find-python) && new=$$(mktemp -d) && trap 'rm -rf "$$new"' EXIT && \
	"$$python" -m venv "$$new" && \
	"$$new/bin/python" -m pip install --quiet --editable '.[dev]' $(LOCK_PINS) && \
	sed -n '/^#/p' requirements.lock > "$$new/lock" && \
	"$$new/bin/python" -m pip freeze --all --exclude pip --exclude foxtrot >> "$$new/lock" && \
	cp "$$new/lock" requirements.lock

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
