PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: simulate baseline deploy-demo test test-all check format clean

simulate: $(INSTALLED)  ## the main job; ARGS="privacy.epsilon=1" changes it
	$(BIN)/coterie simulate $(ARGS)

baseline: $(INSTALLED)  ## the same run without privacy
	$(BIN)/coterie simulate privacy=none $(ARGS)

deploy-demo: $(INSTALLED)  ## a coordinator and three sites as processes of this machine, TLS and all
	$(BIN)/python -m simulations.deployment $(ARGS)

test: check  ## lint, types, arrows, and the quick suite
	$(BIN)/python -m pytest -q -n 2

test-all: test  ## and the slow tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not alone and not gpu and not network"
	$(BIN)/python -m pytest -q -m "alone and not gpu and not network"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint deploy/Dockerfile

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# --no-compile: half of the time, for modules of which most are never imported.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo,audio,export,metrics,tracking,sweeps,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
