# Every target does its own set-up: a virtual environment with the pinned versions and an editable install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all lint docs bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else f"can-dist needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}; run: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/can-dist demo --run runs/demo

# the unit tests share the cores; the integration tests take all of them, one after the other
test: setup
	$(BIN)/python -m pytest -m 'not slow' -n 2 tests/unit
	$(BIN)/python -m pytest -m 'not slow' tests/integration
	$(BIN)/python -m pytest kernels/tests

# with bitsandbytes, whose slow tests train on CPU ranks
test-all: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,qlora]'
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every link, anchor and picture is checked; a warning ends the build
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python -m mkdocs build --strict

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/dual_solve.py
	$(BIN)/python benchmarks/dual_scale.py
	$(BIN)/python benchmarks/train_vs_trl.py
	$(BIN)/python benchmarks/score_vs_pipeline.py
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
