# Two commands for a newcomer: `make run` and `make test`. Each sets up what it needs in .venv from the hash-locked
# requirements; nothing has to be installed beforehand but Python 3.11 or newer and make.
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
BASE_PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
KILLS ?= 200
STORE ?= both
SUITE := $(VENV)/json-schema-test-suite
# The tests of a file stay together, because they share services.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

# Keep bytecode where the environment says otherwise: hundreds of processes would compile the service again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test quick one fix lint types types-of-tests tests bench crash attack docs wheel lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(BASE_PYTHON)" || { echo "No Python 3.11 or newer found; install one, or name it: make BASE_PYTHON=/path/to/python3"; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python requirements.txt requirements-build.txt pyproject.toml
	@echo "Installing the locked requirements into $(VENV) …"
	$(PIP) install --require-hashes -r requirements.txt -r requirements-build.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# The lock is whole, so nothing is resolved again: one declared bound is overridden in it ([tool.uv] in pyproject.toml).
$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	@echo "Installing what the tests need …"
	$(PIP) install --no-deps --require-hashes -r requirements-dev.txt
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev requirements-bench.txt
	@echo "Installing what is measured beside us …"
	$(PIP) install --require-hashes -r requirements-bench.txt
	@touch $@

# The official JSON Schema suite comes as data in the source distribution of the jsonschema library, by its hash.
$(SUITE): $(VENV)/installed-dev requirements-suite.txt
	$(PIP) download --no-deps --no-build-isolation --no-binary :all: --require-hashes -r requirements-suite.txt --dest $@
	@touch $@

run: $(VENV)/installed  ## run the demo: a validation, a purchase, an export; then the service keeps running
	@$(BIN)/norce-adapter demo

test: lint tests  ## run everything that CI checks

quick: $(VENV)/installed-dev  ## run the tests that need no PostgreSQL and start no service, in under a minute
	$(BIN)/python -m pytest $(PARALLEL) --quick

one: $(SUITE)  ## run some tests: T=tests/ledger, T="tests/cli -k retry"
	$(BIN)/python -m pytest $(T)

fix: $(VENV)/installed-dev  ## format the code and correct what ruff can correct
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: $(VENV)/installed-dev  ## check format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory -j2 types types-of-tests
	$(BIN)/lint-imports

types:
	$(BIN)/mypy

types-of-tests:
	$(BIN)/mypy --cache-dir .mypy_cache/tests --config-file tests/mypy.ini

# The tests of speed need the machine for themselves. They are in these two folders (a check in tests/conftest.py).
tests: $(SUITE)
	$(BIN)/python -m pytest $(PARALLEL) -m "not speed"
	$(BIN)/python -m pytest -m speed tests/attacks tests/flows

bench: $(VENV)/installed-bench  ## measure the claims as ratios within one run: ONLY="accept dispatch" for some
	$(BIN)/python benchmarks/run.py $(ONLY)

crash: $(VENV)/installed-dev  ## kill the service many times: KILLS=200 STORE=sqlite|postgresql|both SEED=…
	$(BIN)/python -m tests.crash --kills $(KILLS) --store $(STORE) $(if $(SEED),--seed $(SEED))

attack: $(VENV)/installed-dev  ## attack a running service and measure: ONLY=trailers for one, SECONDS_OF_ATTACK=60
	$(BIN)/python -m tests.attacks $(or $(ONLY),all) $(if $(SECONDS_OF_ATTACK),--seconds $(SECONDS_OF_ATTACK))

docs: $(VENV)/installed-dev  ## regenerate what is generated
	$(BIN)/python -m tests.config.reference
	$(BIN)/python -m tests.sandbox.test_docs
	$(BIN)/python -m tests.test_reference

wheel: $(VENV)/installed-dev  ## build the wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

lock:  ## resolve the requirements again (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.txt
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --group build -o requirements-build.txt
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --group dev -c requirements.txt -o requirements-dev.txt
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --group bench -c requirements.txt -c requirements-dev.txt -o requirements-bench.txt

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
