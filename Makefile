# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv and build the extension first.
PYTHON ?= python3
# Another torch: make TORCH=torch==2.11.0 (in a new .venv)
TORCH ?= $(shell grep '^torch==' requirements-dev.txt)
ARGS ?=
BIN := .venv/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

.PHONY: demo test bench lint format clean
demo: .venv/.built
	$(BIN)/python -m losssurf_fast demo $(ARGS)

test: .venv/.built
	$(BIN)/python -m pytest -q $(ARGS)

# make bench ARGS="--only lrt --quick"
bench: .venv/.built
	$(BIN)/python -m losssurf_fast bench $(ARGS)

lint: .venv/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "losssurf_fast needs Python 3.11 or newer; choose one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	grep -v '^torch==' requirements-dev.txt | $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -r /dev/stdin
	@touch $@

.venv/.built: .venv/.requirements $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf .venv build demo_output experiments_output losssurf_fast/*.so *.egg-info
