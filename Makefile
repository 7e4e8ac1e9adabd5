# `make demo` is all that a new clone needs. Variables: PYTHON=python3.12, PYTEST_ARGS="-k vae", DEMO=folder,
# GPU_ARGS="--wheels FOLDER".
PYTHON ?= python3
DEMO ?= demo
# worksteal: consecutive tests run in one process, so that a fixture of a module is made once.
PYTEST_ARGS ?= -n auto --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
# The stamp is written last. While .unfinished exists, the set-up was interrupted and starts again from an empty folder.
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished

.DEFAULT_GOAL := help
.PHONY: help setup demo test gpu lint format clean

help:
	@echo "make demo    draw images from prompts, and take photos through the VAE, into $(DEMO)/"
	@echo "make test    run the tests; PYTEST_ARGS='-m slow' passes options to pytest"
	@echo "make gpu     prove and measure everything on a GPU, into gpu-results/, in eight minutes"
	@echo "make lint    run ruff, mypy, and import-linter"
	@echo "make format  let ruff fix and format the code"
	@echo "make setup   set up $(VENV), which the commands above do by themselves"
	@echo "make clean   remove $(VENV), caches, and built files"

setup: $(STAMP)

$(STAMP): requirements-lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "sdkit needs Python 3.10 or newer and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12." % sys.version_info[:2])'
	@if test -e $(UNFINISHED); then echo "Starting an interrupted set-up again."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(UNFINISHED)
	$(PYTHON) -m venv $(VENV)
	@# The locked versions need Python 3.11; Python 3.10 gets the newest versions that pyproject.toml allows.
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then $(BIN)/python -m pip install -r requirements-lock.txt && \
	     $(BIN)/python -m pip install --no-deps --no-build-isolation --editable .; \
	else $(BIN)/python -m pip install --editable '.[train,dev]'; fi
	@mv $(UNFINISHED) $@

demo: $(STAMP)
	$(BIN)/python -m sdkit demo --out $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# A machine with a GPU may have its own PyTorch, which must not be replaced: .venv is used only if it is there.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find sdkit tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
