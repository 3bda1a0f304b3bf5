# make run      the quickstart, from raw text to a chat window
# make test     the tests          make test-all   the slow ones too
# make lint     ruff, mypy, the layers between rooms
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# a file's tests stay together: they share what takes long to make
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: run test test-all lint bench clean

run: $(VENV)/.installed-all
	@$(BIN)/bessemer run quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "" $(SIDE_BY_SIDE)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find src -name "*.nb[ic]" -delete  # compiled loops, which do not notice what changed in another file
