# One word per act. Every target sets up what it needs, so that each works as the first command on a fresh clone.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-swift swift page test test-fast fuzz check format lint types bench docs lock clean

# The newest supported Python, but for slow ones; `make PYTHON=/path/to/python3.12 setup` names one. It is looked for once.
PYTHON ?= $(eval PYTHON := $(shell sh tools/python.sh))$(PYTHON)
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
# Two workers with one thread each beat one worker with two threads: most tests are small.
WORKERS ?= 2
TOGETHER := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

help:  ## what each word does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv with the exact versions of requirements.lock

$(READY): pyproject.toml requirements.lock
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11, 3.12 or 3.13 with venv was found on PATH;" \
		"install one (macOS: brew install python@3.13; Debian: apt-get install python3 python3-venv)" \
		"or name it: make PYTHON=/path/to/python3.12 setup" >&2; exit 2; fi
	@echo "setting up .venv with $$($(PYTHON) --version) (one to three minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
		--editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## convert the small checkpoint of this repository and draw four pictures with it
	@$(BIN)/python tests/demo.py

test: $(READY)  ## all tests that this machine can run
	@OMP_NUM_THREADS=1 $(PYTEST) $(TOGETHER) -q

test-fast: $(READY)  ## the same without the slow ones
	@OMP_NUM_THREADS=1 $(PYTEST) $(TOGETHER) -q -m 'not slow'

swift: $(READY)  ## build the Swift package, run its tests, compare its pictures with Python's
	@command -v swift >/dev/null || { echo "error: no swift on PATH; install a toolchain of Swift 6 or later" >&2; exit 2; }
	@OMP_NUM_THREADS=1 SWIFT_PICTURES=all $(PYTEST) -q tests/swift

demo-swift: $(READY)  ## the pictures of make demo, drawn by the Swift program
	@command -v swift >/dev/null || { echo "error: no swift on PATH; install a toolchain of Swift 6 or later" >&2; exit 2; }
	@$(BIN)/python tests/demo.py --swift

# Gradio needs Pillow 12, the lock has 13: the page's tests have an environment of their own.
PAGE := .venv-page
$(PAGE)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -m venv $(PAGE)
	@grep -v '^pillow==' requirements.lock > $(PAGE)/constraints.txt
	@$(PAGE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PAGE)/constraints.txt \
		--editable '.[dev,ui]'
	@touch $@

page: $(PAGE)/.ready  ## tests of the page of serve --ui in a browser (chromium or Chrome on PATH)
	@OMP_NUM_THREADS=1 $(PAGE)/bin/python -m pytest -q tests/runtime/test_serve_page.py

# Numbers of cases: the same numbers, the same damage and the same moments.
CASES ?= 2000
KILLS ?= 300
RACES ?= 64

fuzz: $(READY)  ## damaged inputs, kills and races: half an hour (make fuzz CASES=200 KILLS=30 RACES=8)
	@PYTHONPATH=tests $(BIN)/python -m fuzz.inputs --cases $(CASES)
	@PYTHONPATH=tests $(BIN)/python -m fuzz.kills --kills $(KILLS) --races $(RACES)

check: format-check lint  ## format, lint, types (mypy --strict), tests: what CI runs
	@$(MAKE) --no-print-directory --jobs 2 types test

format: $(READY)  ## rewrite the source in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.PHONY: format-check
format-check: $(READY)
	@$(BIN)/ruff format --check .

lint: $(READY)  ## ruff
	@$(BIN)/ruff check .

types: $(READY)  ## mypy --strict over source and tests
	@$(BIN)/mypy convert runtime tests tools benchmarks

bench: $(READY)  ## speed and memory at full size: about an hour and 10 GB of disk
	@$(BIN)/python benchmarks/run.py

docs: $(READY)  ## the API reference, from the docstrings, to site/
	@$(BIN)/python -W error -m pdoc --docformat restructuredtext -o site diffusion_convert diffusion_runtime && echo "site/index.html"

lock: $(READY)  ## rewrite requirements.lock from what is installed in .venv
	@$(BIN)/python -m pip freeze --exclude-editable --exclude coreml-sd | sed -E 's/\+[a-z0-9.]+$$//' > requirements.lock.new
	@mv requirements.lock.new requirements.lock && touch $(READY)

clean:  ## remove everything that the other words made
	rm -rf .venv .venv-page demo site shapes-* bench-out swift_bridge/.build .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
