# Needs Python >= 3.10 and nothing else. `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
TIER ?= smoke
SEEDS ?= 0
ROOT ?= oodrepro-runs
PAPERS ?= all
JOBS ?= 2
# What is finished with the same notebooks, code, data and seeds is left alone; RESUME= runs every notebook again.
RESUME ?= --resume

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torchvision has no build for CPUs alone, and its CUDA build needs torch's: the full stack, beside the pinned environment.
INTEROP := .venv-interop
INTEROP_STACK := torch==2.15.0 torchvision==0.29.2 pytorch-ood==0.4.0 diffusers==0.42.1
# Tests run in $(JOBS) processes of one thread each: two threads that wait for each other crawl on a busy machine.
# GNU timeout where there is one: nbdev_test has no limit of its own.
TIMEOUT := $(shell command -v timeout >/dev/null 2>&1 && echo "timeout 2400")

# Nothing is read from or written to the home folder.
export MPLCONFIGDIR := $(abspath $(VENV))/home/matplotlib
export IPYTHONDIR := $(abspath $(VENV))/home/ipython
export JUPYTER_CONFIG_DIR := $(abspath $(VENV))/home/jupyter
export JUPYTER_RUNTIME_DIR := $(abspath $(VENV))/home/jupyter-runtime

.PHONY: help env reproduce report check tables figures doctor lab sync lint nbtest test test-wheel test-interop clean distclean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TIER=$(TIER) SEEDS=$(SEEDS) ROOT=$(ROOT) PAPERS=$(PAPERS) JOBS=$(JOBS) RESUME=$(RESUME)"

env: $(READY) ## make the virtual environment with the tested versions

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"oodrepro needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no ensurepip (on Debian: apt install python3-venv)"; exit 1; }
	@echo "installing the tested versions into $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,cluster]'
	@mkdir -p $(JUPYTER_RUNTIME_DIR)
	@touch $(READY)

reproduce: $(READY) ## all papers at tier smoke; e.g. make reproduce PAPERS=lmd TIER=laptop SEEDS=0-2
	$(BIN)/oodrepro reproduce $(PAPERS) --tier $(TIER) --seeds $(SEEDS) --root $(ROOT) $(RESUME)
	@$(BIN)/oodrepro report --root $(ROOT)

report: $(READY) ## one page from the receipts below ROOT; ROOT=. for the committed ones
	@$(BIN)/oodrepro report --root $(ROOT)

check: $(READY) ## recompute every committed metric and table from the committed scores
	@$(BIN)/oodrepro check --root .

tables: $(READY) ## write every committed table again from its receipts
	@$(BIN)/oodrepro tables --root .

figures: $(READY) ## draw every committed figure of scores again from its receipts
	@$(BIN)/oodrepro figures --root .

doctor: $(READY) ## look at this installation
	@$(BIN)/oodrepro doctor --root .

lab: $(READY) ## JupyterLab in nbs/
	$(BIN)/jupyter lab nbs

sync: $(READY) ## write the modules from the notebooks and clean the notebooks; before every commit
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

lint: $(READY) ## hygiene of notebooks and modules, nothing being changed
	$(BIN)/python tests/guards.py
	$(BIN)/ruff check --no-cache oodrepro tests setup.py

nbtest: $(READY) ## run the library notebooks' own tests
	OMP_NUM_THREADS=1 $(TIMEOUT) $(BIN)/nbdev_test --n_workers $(JOBS) --skip_folder_re '^[_.]|^papers$$'

test: lint check nbtest ## everything: sync, hygiene, committed numbers, notebooks, headless papers, pytest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-wheel: $(READY) ## the wheel in a new environment without nbdev, from an empty folder (downloads everything again)
	OODREPRO_FRESH_ENVIRONMENT=1 $(BIN)/python -m pytest -q -s tests/test_install.py

test-interop: $(INTEROP)/.ready ## parity with pytorch-ood, in an environment of its own (6 GB, once)
	OMP_NUM_THREADS=1 $(INTEROP)/bin/python -m pytest -q -rs -p no:cacheprovider tests/test_interop.py tests/test_detectors.py

$(INTEROP)/.ready: settings.ini setup.py Makefile
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check $(INTEROP_STACK) pytest -e '.[interop]'
	@touch $@

clean: ## remove builds and caches; results, runs and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments
	rm -rf $(VENV) $(INTEROP)
