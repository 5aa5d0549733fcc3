# `make` lists what there is. pip's own settings (pip.conf, PIP_* variables) decide where packages come from.
PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)
PYTHONS ?= 3.11 3.12 3.13
SCRATCH := build/constraints

.DEFAULT_GOAL := help
.PHONY: help env lint format test test-full test-gpu soak demo bench wheel constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo 'Variables: PYTHON=$(PYTHON) TORCH_SPEC=$(TORCH_SPEC) VENV=$(VENV) PYTEST_ARGS=$(PYTEST_ARGS)'

env: $(STAMP) ## create the environment, once; the others do it as needed

# torch goes first, so that the second line finds whichever build of it TORCH_SPEC asked for.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'medclr needs Python 3.11 or newer; name one with: make env PYTHON=python3.11' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH_SPEC)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

lint: env ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: env ## put the code into the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: env ## the quick tests
	$(PYTEST) -m 'not slow and not gpu and not bench'

test-full: env ## the slow tests, which `make test` leaves out
	$(PYTEST) -m 'slow and not gpu and not bench'

test-gpu: env ## the tests that need a CUDA device
	$(PYTEST) -m gpu

soak: env ## half an hour of kills and of one long run; prints its figures
	$(BIN)/python -m tests.survival.soak

demo: env ## the whole of medclr on a synthetic cohort, in a few minutes
	rm -rf runs/demo
	$(BIN)/medclr demo --output runs/demo

bench: env ## run each benchmark and print its figures
	@set -e; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

wheel: env ## build a wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel

constraints: ## resolve all dependencies anew and write constraints.txt
	rm -rf $(SCRATCH)
	$(PYTHON) -m venv $(SCRATCH)
	$(SCRATCH)/bin/python -m pip install "$(TORCH_SPEC)"
	$(SCRATCH)/bin/python -m pip install -e '.[dev]'
	@{ echo '# The version of every package that medclr, its tests and its tools pull in. Do not edit: `make constraints` writes it.'; \
	   echo "# Resolved in a fresh environment with $$($(PYTHON) --version) on $$(uname -sm), $(TORCH_SPEC) first, then medclr[dev];"; \
	   echo '# a wheel of each version was found for Python $(PYTHONS).'; \
	   echo '# Left out: torch (TORCH_SPEC of the Makefile decides), what only its CUDA builds pull in (nvidia-*, cuda-*, triton),'; \
	   echo '# pip, and medclr itself.'; \
	   $(SCRATCH)/bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude torch \
	     | grep -viE '^(nvidia-|cuda-|triton)'; } > $(SCRATCH)/constraints.txt
	@set -e; for version in $(PYTHONS); do echo "wheels for Python $$version"; \
		$(SCRATCH)/bin/python -m pip install --quiet --dry-run --no-deps --ignore-installed --only-binary=:all: \
		--python-version "$$version" --target $(SCRATCH)/none -r $(SCRATCH)/constraints.txt; done
	mv $(SCRATCH)/constraints.txt constraints.txt
	rm -rf $(SCRATCH)

clean: ## remove caches and what was built; the environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path './.*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
