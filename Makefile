# Everything runs in environments of its own; a machine needs Python (3.11 to 3.13), git and make.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
VENV312 := .venv312
DEMO_VENV := .venv-demo
# test files run side by side, each one's tests in order; tests/conftest.py says which files start first
SIDE_BY_SIDE := --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# Python compiles the modules that are imported, and keeps them: pip would compile thousands that never are
PIP_INSTALL := -m pip install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

# tests of what does not depend on the versions of zarr, anndata and pandas: one Python is enough
OF_ONE_VERSION := test_apart.py test_bad_input.py test_benchmark_command.py test_benchmarks.py test_bionemo.py \
	test_bionemo_joining.py test_bionemo_readme.py test_cli.py test_collection.py test_crash.py test_csc_sources.py \
	test_dealing.py test_dense_sources.py test_exactness.py test_executors.py test_explain.py test_filters.py test_finding.py \
	test_forged_chunks.py test_interpreter_end.py test_kernels.py test_leftovers.py test_lightning.py test_loader_gpu.py \
	test_loader_options.py test_loader_ranks.py test_loader_resume.py test_loader_threads.py test_loader_torch.py \
	test_lost_parts.py test_mapped.py test_memory.py test_orders.py test_permutation.py test_plan.py test_progress.py \
	test_ragged.py test_recent.py test_remote_views.py test_row_selection.py test_scdl_readme.py test_scdl_weaknesses.py \
	test_targets.py

.PHONY: environments demo test slow lint test-py312 test-py312-all kills test-scdl notebooks benchmark clean full

# the demo needs less than the tests do, and takes their environment where that is there
DEMO_IN := $(if $(wildcard $(VENV)/ready),$(VENV),$(DEMO_VENV))

demo: $(DEMO_IN)/ready
	$(DEMO_IN)/bin/scdl-zarr demo --into .demo

environments: $(VENV)/ready $(VENV312)/ready

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests $(SIDE_BY_SIDE)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

notebooks: $(VENV)/ready
	$(VENV)/bin/python -m notebooks.run notebooks/01_convert_and_explore.ipynb

test-py312: $(VENV312)/ready
	$(VENV312)/bin/python -m pytest tests $(SIDE_BY_SIDE) $(addprefix --ignore=tests/,$(OF_ONE_VERSION))

# what takes long, and is proven by something cheaper on every change
slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests -m slow

# every test on Python 3.12, too
test-py312-all: $(VENV312)/ready
	$(VENV312)/bin/python -m pytest tests $(SIDE_BY_SIDE)

# conversions that are killed at random moments, and at random fsync calls, many times; errors at every file of the commit
kills: $(VENV)/ready
	SCDL_ZARR_KILLS=40 $(VENV)/bin/python -m pytest tests/test_crash.py -k "random or commit"

# the tests of what BioNeMo-SCDL does, on BioNeMo-SCDL itself: whoever misreads it fails here
test-scdl:
	python=$$($(PYTHON) -m benchmarks.venvs scdl) && SCDL_FACTS=bionemo $$python -m pytest tests/scdl_facts --confcutdir=tests/scdl_facts -W default

benchmark: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks

full: lint test slow test-py312-all kills notebooks benchmark

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[torch,test,notebooks]'
	touch $@

$(VENV312)/ready: pyproject.toml constraints.txt
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python $(PIP_INSTALL) --editable '.[test,notebooks]'
	touch $@

$(DEMO_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(DEMO_VENV)/bin/python $(PIP_INSTALL) --editable '.[torch,notebooks]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV312) $(DEMO_VENV) .demo benchmarks/.envs
