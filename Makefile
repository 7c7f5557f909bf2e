# Each target makes the environment it needs; PYTHON may name any Python from 3.10 on.
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint test-bench

demo: .venv/installed
	.venv/bin/sae-matryoshka demo --out demo_run

test: .venv/installed-dev .peers/installed
	.venv/bin/python -m pytest

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

# SAEBench pins older libraries than SAELens takes alone, so it has an environment of its own.
test-bench: .venv-bench/installed
	.venv-bench/bin/python -m pytest tests/bench

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python $(PIP) -e '.[dev]'
	touch $@

# The libraries whose checkpoints are read, beside the environment: see tests/peers.
.peers/installed: tests/peers/requirements.txt .venv/installed
	rm -rf .peers
	.venv/bin/python $(PIP) --no-deps --target .peers/site -r tests/peers/requirements.txt
	touch $@

.venv-bench/installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP) -e '.[bench,dev]'
	touch $@
