# Every target sets up what it needs by itself, once: a virtual environment in .venv and the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-browser test-all lint bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/gradientspace demo $(if $(FRESH),--fresh) $(if $(CONTROL),--control $(CONTROL))

test: $(READY)
	$(BIN)/python -m pytest

test-browser: $(READY)
	npm install --prefix tests/browser --no-package-lock --no-audit --no-fund
	$(BIN)/python -m pytest -m browser

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/python benchmarks/gradients.py --quick

clean:
	rm -rf $(VENV)
