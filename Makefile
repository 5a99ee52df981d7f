PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart check docs test notebook dist-test faults mutants clean

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
	$(MAKE) docs

# The site of docs/, in site/: a broken link, a page outside the navigation or a name without docstring is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: install
	$(BIN)/pytest

# Executes the notebooks of docs/ again and stores their outputs: minutes.
notebook: install
	$(BIN)/python scripts/execute_notebook.py docs/break-ppo.ipynb
	$(BIN)/python scripts/execute_notebook.py docs/grpo-stays.ipynb

# Builds wheel and sdist, installs each into an empty environment, and trains a step there: minutes, with a network.
dist-test:
	$(PYTHON) scripts/test_distributions.py

# Every fault in its long form, counted: about five minutes. `make faults SEED=5` has others; tests/faults/test_faults.py a few of each.
SEED ?= 4
faults: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --seed $(SEED)

# Changes one line of src at a time and says which changes the tests miss: hours, so `make mutants AREA=control` or
# `make mutants SAMPLE=60`. The changes are a list (tests/mutants/*.yaml) and not made by mutmut or cosmic-ray: every
# change starts a Python that takes seconds to import torch, and their operators make thousands of changes, few of them
# an engineer's mistake. Each of ours is one, and names the tests that notice it.
mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(if $(AREA),--area $(AREA)) $(if $(SAMPLE),--sample $(SAMPLE))

clean:
	rm -rf .venv
