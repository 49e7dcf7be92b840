# Each target works alone on a fresh machine with Python (3.11 or newer), git and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: setup demo test check format gpu-check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gpt2lab needs Python 3.11 or newer, not $$($(PYTHON) --version). Fix: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup  ## train GPT-2 four ways and report what each change costs and buys
	$(BIN)/gpt2lab demo

# A file on each core, with one thread: the models of the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: setup  ## all tests that need no GPU
	$(PYTEST)

check: setup  ## everything a commit must pass
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST)

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# On a GPU machine that already has torch, use what is there: make gpu-check PYTHON=python3 GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)  ## the same mathematics on CUDA
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -o addopts= -q tests/gpu

clean:
	rm -rf $(VENV) build dist
