# The two commands of the README, and what they are made of. Continuous integration calls the same targets.
#
#   make demo      a .venv with the base, then a contact sheet painted on this machine
#   make test      adds what development needs, then every check and every test that is not slow
#   make test-all  the slow tests
#   make format    rewrites the code as the checks want it

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-all lint types imports unit format clean

demo: .venv/.base
	$(BIN)/gesso demo

test: lint types imports unit

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

imports: .venv/.dev
	$(BIN)/lint-imports --no-logo

unit: .venv/.dev
	$(PYTEST) -m "not slow"

test-all: .venv/.dev
	$(PYTEST) -m slow || test $$? -eq 5 # 5: there is no slow test

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist

# A stamp a stage: made again when what it depends on changes, otherwise a second run starts at once.

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 demo" >&2; exit 2; }
	@echo "making .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@touch $@

.venv/.base: .venv/.made pyproject.toml constraints.txt
	@echo "installing gesso and what it needs into .venv (torch is large: the first time takes minutes)"
	@$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.base
	@echo "installing what development needs into .venv"
	@$(PIP) --editable '.[dev]'
	@touch $@
