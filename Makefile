# The environment is made once, from the tested versions; a change of either file makes it anew.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready

.PHONY: train test check clean

train: $(READY)  ## the project's main job, on the embedded digits
	$(BIN)/torchrun deit/main.py --augsub masking --augsub-ratio 0.5

test: $(READY)  ## those on Slurm, whose daemons want the machine to themselves, and then all others, two at a time
	$(BIN)/python -m pytest tests/test_slurm.py
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/test_slurm.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12 …') if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
