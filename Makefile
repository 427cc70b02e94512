# make demo   set up everything and run the demo: train, prune gradually, compare with one-shot pruning (3 minutes)
# make test   set up everything and run the checks and tests that a change needs (6 minutes after the set-up)
# make test-all  run the remaining tests: every backend in full, sanitizers, wheels, processes, docs (CI runs both)
# make docs   build the documentation as a site in site/; any warning is an error
# make bench  measure this library against torch and numpy on this machine; writes benchmarks/results/
# make format  format the code
# make gpu-check [STAGE=smoke|bench|suite|...]  test and measure the GPU of this machine, with its own torch (9 minutes)
#
# The environment is in .venv. It is rebuilt only if its sources change. gpu-check does not use it. The sizes of downloads
# and the times that are printed were measured on two busy cores; the shorter times are what the processors worked.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# Idle threads of one process would wait on the cores that another needs: with two each, the tests take twice as long.
# Tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py csrc/cuda_toolkit.py pyproject.toml
CXX_SOURCES := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench gpu-check format clean

help:
	@sed -n 's/^# \?//; 1,/^$$/p' Makefile

demo: $(VENV)/.demo
	$(BIN)/gmp-kernels demo $(DEMO_ARGS)

test: lint
	@echo '== tests, two files at a time'
	$(PYTEST) $(TWO_AT_A_TIME)

test-all: $(VENV)/.test docs
	@echo '== thorough tests'
	$(PYTEST) $(TWO_AT_A_TIME) -m thorough
	@echo '== benchmarks, one tiny round each, to see that they run'
	$(PYTEST) benchmarks --benchmark-disable

lint: $(VENV)/.test
	@echo '== ruff, mypy, clang-format'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# The pages of the API come from the docstrings, and the page of the command line from its help.
docs: $(VENV)/.test
	$(BIN)/typer gmp_kernels.tools.cli.main utils docs --name gmp-kernels --title 'Command line' \
	  --output docs/command-line.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.demo
	@mkdir -p benchmarks/results
	$(BIN)/gmp-kernels bench --output benchmarks/results

gpu-check:
	@$(PYTHON) benchmarks/gpu_check.py $(STAGE)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist site docs/command-line.md *.egg-info gmp_kernels/*.so

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v g++ >/dev/null || { echo 'g++ is missing: install it (Debian: apt install g++)'; exit 1; }
	@echo '== creating $(VENV) and installing $(TORCH) (about 2800 MB, or 220 MB of a CPU build; 1 to 9 minutes)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) numpy
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo '== building and installing gmp_kernels (about 80 MB; 1 to 3 minutes)'
	@$(PIP) --editable '.[demo]'
	@touch $@

# The tests run the CUDA kernels on the host, even if there is a GPU. gpu-check builds them for the GPU.
$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo '== building and installing gmp_kernels and the test tools (about 420 MB; 2 to 6 minutes)'
	@GMP_KERNELS_BUILD_CUDA=0 GMP_KERNELS_BUILD_SIMT=1 $(PIP) --editable '.[test]'
	@# One file of it is tested. It requires torchvision, whose usual build would break transformers beside a CPU torch.
	@$(PIP) --no-deps 'timm>=1.0.20'
	@touch $(VENV)/.demo $@
