# Everything runs in environments of its own; a machine needs Python (3.11 to 3.13), git and make.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
VENV312 := .venv312
DEMO_VENV := .venv-demo
# test files run side by side, each one's tests in order
SIDE_BY_SIDE := --numprocesses=logical --maxprocesses=4 --dist=loadfile

.PHONY: demo test lint test-py312 test-scdl notebooks benchmark clean full

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/scdl-zarr demo --into .demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests $(SIDE_BY_SIDE)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

notebooks: $(VENV)/ready
	$(VENV)/bin/python -m notebooks.run notebooks/01_convert_and_explore.ipynb

test-py312: $(VENV312)/ready
	$(VENV312)/bin/python -m pytest tests $(SIDE_BY_SIDE)

# the tests of what BioNeMo-SCDL does, on BioNeMo-SCDL itself: whoever misreads it fails here
test-scdl:
	python=$$($(PYTHON) -m benchmarks.venvs scdl) && SCDL_FACTS=bionemo $$python -m pytest tests/scdl_facts --confcutdir=tests/scdl_facts -W default

benchmark: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks

full: lint test test-py312 notebooks benchmark

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,test,notebooks]'
	touch $@

$(VENV312)/ready: pyproject.toml constraints.txt
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,notebooks]'
	touch $@

$(DEMO_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(DEMO_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,notebooks]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV312) $(DEMO_VENV) .demo benchmarks/.envs
