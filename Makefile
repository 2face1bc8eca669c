# One virtual environment, .venv, for everything; each target installs what it needs, once. Another environment or
# Python: make test VENV=.venv-3.13 PYTHON=/usr/bin/python3.13
SHELL := bash
VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
# Tests at a time: one more than there are cores, since one or the other waits for a disk or a server.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n + 1 : 8)))
# What has to be built or installed anew when it changes; Python files take effect as they are.
BUILT_FROM := pyproject.toml $(wildcard engine/_*.pyx engine/_*.pxi) .pkg/coffret/__init__.py
# Install with the target's EXTRAS, and compile all modules, as pip does with packages that are not edited in place: where
# PYTHONDONTWRITEBYTECODE is set, each start would compile a hundred, which takes longer than all else it does.
define INSTALL
$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
$(BIN)/python -m compileall -q .pkg/coffret .pkg/coffret/*/
endef

.PHONY: help venv demo test lint types bench fuzz damage crash load clean

help:
	@echo 'make demo    back up, check and restore a real directory, and show each command'
	@echo 'make test    all tests'
	@echo 'make lint    ruff and import-linter;  make types: mypy'
	@echo 'make bench   measure, beside other backup programs where they are installed'
	@echo 'make fuzz    minutes of odd bytes for every parser;  make damage: ten minutes of damage to every object'
	@echo 'make crash   an hour of deaths at every call and power losses;  make load: ten minutes of clients and maintenance'
	@echo 'make venv    only install, into $(VENV): $(BIN)/coffret is the program'
	@echo 'make clean   remove $(VENV) and everything else that was made here'

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash tests/demo.sh

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-lint
	$(BIN)/mypy
	$(BIN)/mypy tests bench

bench: $(VENV)/.installed
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.report

fuzz: $(VENV)/.installed-test
	COFFRET_FUZZ_EXAMPLES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest -q -s tests/fuzz

damage: $(VENV)/.installed-test
	PYTHONPATH=.pkg:. $(BIN)/python -m tests.damage $(or $(TIME_S),600)

crash: $(VENV)/.installed-test
	PYTHONPATH=.pkg:. $(BIN)/python -m tests.crash $(or $(TIME_S),3600)

load: $(VENV)/.installed-test
	$(BIN)/python -m bench.load --storage $(or $(STORAGE),local) --seconds $(or $(TIME_S),600)

clean:
	rm -rf $(VENV) build dist .pkg/*.egg-info engine/_*.c engine/_*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A link to an interpreter that has gone counts as missing, hence --clear.
$(BIN)/python:
	@python='$(PYTHON)'; python=$${python:-$$(.ci/pythons newest)} && echo "$(VENV) is made with $$python" && \
	    { "$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }; }

$(VENV)/.installed: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL)
	@touch $@

$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-test: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: EXTRAS := [test,lint]
$(VENV)/.installed-lint: $(BUILT_FROM) | $(BIN)/python
	$(INSTALL)
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
