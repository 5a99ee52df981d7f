PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart check test faults clean

# The virtual environment with pinned versions; made again when a pin or a dependency changes.
install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/stable-rlhf train

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: install
	$(BIN)/pytest

# Every fault in its long form, counted: ten minutes. `make faults SEED=5` has others; tests/faults/test_faults.py a few of each.
SEED ?= 4
faults: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --seed $(SEED)

clean:
	rm -rf .venv
