# `make quickstart`: from a clone to an agent that learns in context. `make test`: types, style, tests.
# Both make .venv when it is missing. Choose the interpreter with PYTHON=…, the place with VENV=….
PYTHON ?= python3.11
VENV ?= .venv
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test install lint types pytest clean

quickstart: install
	$(VENV)/bin/lram quickstart

test: install lint types pytest

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy needs a folder in which the repository root is called `lram`.
types:
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/lram
	cd $(VENV)/types && "$(abspath $(VENV))/bin/mypy" --config-file lram/pyproject.toml -p lram.datasets -p lram.collectors -p lram.converters -p lram.model -p lram.train -p lram.flows

# A file's tests stay in one process: they share datasets and servers.
pytest:
	$(VENV)/bin/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) *.egg-info
