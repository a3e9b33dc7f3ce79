PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PARTS  := app pipelines accel kernels eval
TESTS  := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PROMPT ?= a red circle moving left over a black background
export PROMPT

.PHONY: generate test test-long test-slow test-vbench screens check format typing clean
.DELETE_ON_ERROR:

generate: $(VENV)/.installed  ## write a video of PROMPT="…"
	@$(BIN)/kinora generate "$$PROMPT"

test: $(VENV)/.test-installed  ## the default test suite
	$(TESTS) -m "not long and not slow and not gpu"

test-long: $(VENV)/.test-installed  ## the long tests too, as each change on main has to pass them
	$(TESTS) -m "not slow and not gpu"

test-slow: $(VENV)/.test-installed  ## the slow tests too: all that need no GPU
	$(BIN)/python -m pytest -m "not gpu"

test-vbench: $(VENV)/.test-installed  ## the tests that install the VBench package
	$(BIN)/python -m pytest tests/eval/test_vbench_package.py

screens: $(VENV)/.test-installed  ## pictures of the page in every width and scheme, to look at
	$(BIN)/python docs/screens.py build/screens

check: $(VENV)/.dev-installed typing  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev-installed  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typing:  ## links from package name to folder, so that type checkers see `kinora.*`
	@mkdir -p .typing/kinora
	@for part in $(PARTS); do ln -sfn ../../$$part .typing/kinora/$$part; done

# Each stamp is renewed when the dependencies change, so the second call of a target starts at once.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Kinora needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Name a newer one: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@echo "installing Kinora and what it needs into $(VENV)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group test
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) .typing build dist *.egg-info
