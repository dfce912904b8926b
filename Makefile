# make demo: set-up and main job on a fresh machine.   make test: set-up and the whole test suite.   make style: linters.
# make matrix: the tests with the lowest, the pinned and the newest versions, and with other Pythons; ends with a table.
#   TESTS: arguments of pytest; ONLY: environments, e.g. lowest,newest; PYTHONS: further interpreters, with pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ONLY ?= lowest,pinned,newest
PYTHONS ?= python3.12,python3.13

.PHONY: demo test slow style matrix clean

demo: $(VENV)/.train
	$(BIN)/python recipes/quickstart.py --output_dir outputs/quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

matrix:
	$(PYTHON) tools/matrix.py --only "$(ONLY)" --pythons "$(PYTHONS)" --tests "$(TESTS)"

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(wildcard .venv-*) outputs
