# make demo        environment, weights, real scans, data set, fine-tuning, evaluation, report
# make test        tests, without torch
# make test-parity comparison with PyTorch, in an environment of its own
# make test-serve  the server for napari and 3D Slicer, by their client, in an environment of its own
# make test-docs   the commands of README and docs, on small data
# make test-cluster runs of several devices and processes, some of them killed; the Containerfile's steps
# make fuzz        20,000 damaged scans are read (FUZZ_MUTATIONS=...)
# make lint        ruff check and format
# make notebook    docs/quickstart.ipynb from top to bottom
# make bench       side-by-side timings and their tables in docs/performance.md (SUITE=cpu|gpu, NAME=row)
# make accelerators  programs compiled for TPU and H100, without either; their tables in the docs
#                  (ONLY=part of a row's name, CHIPS=v5e,v5e-16,h100)
# make test-accelerators  limits of a few of these programs
# make env         only the environment in .venv
#
# PYTHON=...       the interpreter the environments are made with (3.11 or later)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env test test-serve test-docs test-cluster fuzz test-parity lint format demo notebook \
	bench accelerators test-accelerators clean

# The first that runs, is new enough and can make virtual environments: a version manager's shim
# may be on the path and still fail.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && { echo $$python; break; }; done)
# On Linux pip may take PyTorch's CUDA build; with PyTorch's own index of CPU builds in
# PIP_EXTRA_INDEX_URL it takes the smaller one.
TORCH ?= torch==2.13.0

VENV := .venv
PARITY := .venv-parity
SERVE := .venv-serve
BENCH := .venv-bench
ACCELERATORS := .venv-accelerators

# Stamps carry the hash of what they were installed from, so a changed pyproject.toml reinstalls
# and a fresh checkout with other file times does not.
hash = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
ENV_STAMP := $(VENV)/.installed-$(call hash,pyproject.toml setup.py)
NOTEBOOK_STAMP := $(VENV)/.notebook-$(call hash,pyproject.toml setup.py)
LINT_STAMP := $(VENV)/.lint-$(call hash,pyproject.toml setup.py)
PARITY_FILES := pyproject.toml setup.py $(wildcard tests/parity/requirements.txt)
PARITY_STAMP := $(PARITY)/.installed-$(call hash,$(PARITY_FILES))
SERVE_FILES := pyproject.toml setup.py tests/serving/requirements.txt
SERVE_STAMP := $(SERVE)/.installed-$(call hash,$(SERVE_FILES))
BENCH_FILES := pyproject.toml setup.py $(wildcard benchmarks/requirements.txt)
BENCH_STAMP := $(BENCH)/.installed-$(call hash,$(BENCH_FILES))
ACCELERATORS_STAMP := $(ACCELERATORS)/.installed-$(call hash,pyproject.toml setup.py)

define new_venv
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or later with venv found;" \
		"install one, or give its path: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "making $(1) with $(PYTHON)"
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade "pip>=25"
endef

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

env: $(ENV_STAMP)

$(ENV_STAMP):
	$(call new_venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet -e ".[test]"
	@touch $@

test: $(ENV_STAMP)
	$(VENV)/bin/python -m pytest tests --ignore=tests/parity --ignore=tests/docs --ignore=tests/cluster \
		--ignore=tests/accelerators --ignore=tests/serving --numprocesses auto --maxprocesses 4 --dist loadfile

test-docs: $(ENV_STAMP)
	$(VENV)/bin/python -m pytest tests/docs --numprocesses 2

test-cluster: $(ENV_STAMP)
	$(VENV)/bin/python -m pytest tests/cluster

FUZZ_MUTATIONS ?= 20000
fuzz: $(ENV_STAMP)
	FUZZ_MUTATIONS=$(FUZZ_MUTATIONS) $(VENV)/bin/python -m pytest tests/io/test_fuzz_scans.py

$(PARITY_STAMP):
	$(call new_venv,$(PARITY))
	$(PARITY)/bin/python -m pip install --quiet "$(TORCH)"
	echo "$(TORCH)" > $(PARITY)/constraints.txt
	$(PARITY)/bin/python -m pip install --quiet -c $(PARITY)/constraints.txt -e ".[test]" \
		$(addprefix -r ,$(wildcard tests/parity/requirements.txt))
	@touch $@

test-parity: $(PARITY_STAMP)
	XLA_FLAGS= $(PARITY)/bin/python -m pytest tests/parity

$(SERVE_STAMP):
	$(call new_venv,$(SERVE))
	$(SERVE)/bin/python -m pip install --quiet -e ".[test,serve]" -r tests/serving/requirements.txt
	@touch $@

test-serve: $(SERVE_STAMP)
	$(SERVE)/bin/python -m pytest tests/serving

$(LINT_STAMP): $(ENV_STAMP)
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	@touch $@

lint: $(LINT_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(LINT_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(ENV_STAMP)
	$(VENV)/bin/python scripts/demo.py

$(NOTEBOOK_STAMP): $(ENV_STAMP)
	$(VENV)/bin/python -m pip install --quiet -e ".[notebook]"
	@touch $@

notebook: $(NOTEBOOK_STAMP)
	$(VENV)/bin/python scripts/run_notebook.py --notebook docs/quickstart.ipynb

$(BENCH_STAMP):
	$(call new_venv,$(BENCH))
	$(BENCH)/bin/python -m pip install --quiet "$(TORCH)"
	echo "$(TORCH)" > $(BENCH)/constraints.txt
	$(BENCH)/bin/python -m pip install --quiet -c $(BENCH)/constraints.txt -e . \
		$(addprefix -r ,$(wildcard benchmarks/requirements.txt))
	@touch $@

SUITE ?= cpu
bench: $(BENCH_STAMP)
	$(BENCH)/bin/python -m benchmarks.run --suite $(SUITE) $(if $(NAME),--only "$(NAME)")
	$(BENCH)/bin/python -m benchmarks.report

# libtpu and the plugin for CUDA compile without a device.
$(ACCELERATORS_STAMP):
	$(call new_venv,$(ACCELERATORS))
	$(ACCELERATORS)/bin/python -m pip install --quiet -e ".[test]" "jax[tpu]" "jax[cuda13]"
	@touch $@

accelerators: $(ACCELERATORS_STAMP)
	$(ACCELERATORS)/bin/python -m benchmarks.accelerators $(if $(ONLY),--only "$(ONLY)") \
		$(if $(CHIPS),--chips $(CHIPS))

test-accelerators: $(ACCELERATORS_STAMP)
	$(ACCELERATORS)/bin/python -m pytest tests/accelerators

clean:
	rm -rf $(VENV) $(PARITY) $(SERVE) $(BENCH) $(ACCELERATORS) demo build dist *.egg-info .pytest_cache .ruff_cache
