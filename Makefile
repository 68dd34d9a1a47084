# The environment is made once, from the tested versions; a change of either file makes it anew. What trains is installed first, the
# development tools on top of it, so that `make train` waits for nothing that it does not run.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
DEV_READY = $(VENV)/dev-ready
# without --no-compile pip compiles tens of thousands of files on one core, most of which no run imports; Python compiles the others on first import
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

.PHONY: train test test-all check fuzz oracle oracle-quick clean

train: $(READY)  ## the project's main job, on the embedded digits
	$(BIN)/torchrun deit/main.py --augsub masking --augsub-ratio 0.5

test: $(DEV_READY)  ## in minutes: all but Slurm, kills and what is marked slow
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --ignore tests/slurm --ignore tests/chaos

test-all: $(DEV_READY)  ## all: those on Slurm first, whose daemons need the machine to themselves, then the others, two at a time
	$(BIN)/python -m pytest tests/slurm
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm

check: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(DEV_READY)  ## 2,000 damaged files of each image format through each input pipeline
	$(BIN)/python -m tests.fuzz --files 2000

BASE ?= HEAD
oracle: $(READY)  ## trains with the code of the commit BASE and with this tree, and compares the results bit for bit
	$(BIN)/python tests/oracle.py --base $(BASE)

oracle-quick: $(READY)  ## the same for one run of each recipe
	$(BIN)/python tests/oracle.py --base $(BASE) --quick

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12 …') if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[recipes]'
	touch $@

$(DEV_READY): $(READY)
	$(INSTALL) '.[dev]'
	touch $@
