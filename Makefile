# Each target makes the environment it needs; PYTHON may name any Python from 3.10 on.
PYTHON ?= python3
# Python compiles what is imported, when it is: that of all packages takes most of a minute.
PIP = -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo smollm2 test test-plain test-evals notebook lint docs

demo: .venv/installed
	.venv/bin/sae-matryoshka demo --out demo_run

# A small language model and 10M tokens of text: examples/smollm2/README.md. TEXTS=NAME takes a data
# set of the Hub instead of Debian's packages.
smollm2: .venv/installed
	.venv/bin/python -m examples.smollm2.prepare $(TEXTS:%=--texts %)

test: test-plain test-evals notebook

# What `pip install sae-lens-matryoshka` brings.
test-plain: .venv-plain/installed .peers/installed
	.venv-plain/bin/python -m pytest

# What the extra `eval` brings. With DEMO=demo the tests look at that run instead of a short one.
test-evals: export DEMO_RUN = $(DEMO:demo=$(CURDIR)/demo_run)
test-evals: .venv/installed-dev $(DEMO)
	.venv/bin/python -m pytest tests/saebench --timeout 1800  # one fixture runs every evaluation

# The tutorial, in a folder of its own; with DEMO=demo the demo has downloaded its model.
notebook: .venv/installed-dev $(DEMO)
	mkdir -p tutorial_run && cp examples/tutorial.ipynb tutorial_run
	if [ -d demo_run/HuggingFaceTB ] && [ ! -d tutorial_run/HuggingFaceTB ]; then \
	  ln -sfn ../demo_run/HuggingFaceTB tutorial_run; fi
	.venv/bin/python -m pytest --nbmake tutorial_run/tutorial.ipynb

# The last two: the public API as a user's type checker sees it, and what PyPI gets.
lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/pyright --pythonpath .venv/bin/python -p tests/typed
	rm -rf dist && .venv/bin/python -m build --no-isolation && .venv/bin/twine check --strict dist/*

# The site, in build/site; REPO_URL=URL links to the files of the repository there. The variable
# silences an announcement of the theme's authors, which would look like a warning of the build.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e '.[eval,smollm2]'
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python $(PIP) -e '.[eval,smollm2,dev,docs]'
	touch $@

# SAEBench asks for older libraries than SAELens takes alone.
.venv-plain/installed: pyproject.toml
	$(PYTHON) -m venv .venv-plain
	.venv-plain/bin/python $(PIP) -e '.[dev]'
	touch $@

# The libraries whose files are read or written, beside the environment: see tests/peers.
.peers/installed: tests/peers/requirements.txt .venv-plain/installed
	rm -rf .peers
	.venv-plain/bin/python $(PIP) --no-deps --target .peers/site -r tests/peers/requirements.txt
	touch $@
