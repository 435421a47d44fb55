PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
FAULTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_PIN := $(VENV)/torch-constraint.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help install lint test test-slow faults demo clean distclean

help:
	@echo 'make install    make .venv with this project in it, editable, with its development tools'
	@echo 'make test       check style, import floors and types, then run the tests'
	@echo 'make test-slow  run the tests that make test leaves out: many processes, two nodes, a cable that is cut'
	@echo 'make lint       only the checks'
	@echo 'make faults     kill training runs at random moments and compare their ends: most of an hour on two CPU cores'
	@echo 'make demo       run the demonstration on the built-in data set'
	@echo 'make clean      remove caches and build outputs; make distclean removes .venv too'
	@echo
	@echo 'Variables, with their values now:'
	@echo '  PYTHON       the interpreter that makes .venv, 3.10 or newer ($(PYTHON))'
	@echo '  TORCH        what pip is asked for first ($(TORCH))'
	@echo '               The default is the registry'"'"'s build: on Linux with CUDA, several GB. Without a GPU:'
	@echo "               make install TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'"
	@echo '               A torch of that version already in .venv stays, whatever its build.'
	@echo "  PYTEST_ARGS  more arguments for pytest, e.g. PYTEST_ARGS='-k shapes'"
	@echo '  TEST_WORKERS processes that run the tests of make test side by side ($(TEST_WORKERS)); 0: none but pytest itself'
	@echo "  FAULTS_ARGS  more arguments for make faults, e.g. FAULTS_ARGS='--seeds 4'"

install: $(STAMP)

# torch goes first and without its dependencies, so that an index with nothing but torch serves; the second pip call
# brings what it needs, and may not exchange it for another build.
$(STAMP): pyproject.toml constraints.txt Makefile
	@test -x $(BIN)/python || { echo 'making $(VENV) with $(PYTHON)'; $(PYTHON) -m venv $(VENV); }
	@echo 'installing $(TORCH)'
	@$(PIP) install --no-deps $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(TORCH_PIN)
	@echo 'installing dydit_scale and its development tools'
	@$(PIP) install -c constraints.txt -c $(TORCH_PIN) -e '.[dev]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -m 'not slow' -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults build/faults $(FAULTS_ARGS)

demo: $(STAMP)
	$(BIN)/dydit demo

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
