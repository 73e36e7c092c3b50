# Each target makes its own virtual environment in .venv; nothing else needs to be installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/core.stamp  ## a grid of pictures, from a model that is in the repository
	$(BIN)/python sample/demo.py

test: .venv/test.stamp lint  ## lint, types and every test but the slow ones
	$(BIN)/python -m pytest -n 2

test-slow: .venv/test.stamp  ## full-size SD 1.5 and SD 2.1-v against PyTorch, rebuilds of the embedded model; 16 GB
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m slow

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/core.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

# torch first and alone: a resolver that sees it among others may choose a build with CUDA.
.venv/test.stamp: .venv/core.stamp
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,train]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
