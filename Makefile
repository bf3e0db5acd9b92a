# make quickstart   set up .venv, then train, evaluate and sample a small T5 on text that ships with Python
# make test         set up .venv, then run the fast tests;   make test-slow: the others
# make test-core    of the fast tests those of the core, which need no TensorFlow
# make test-exhaustive   what they do to a part, on the whole of it: all rows of all corpora, all mesh shapes
# make torture      kill or stop small runs and conversions KILLS=100 times, at every point; two thirds of them runs of one
#                   process, the others of two (PROCESSES=1,2)
# make study        pre-train a small T5 on T5X_LITE_DATA_DIR, adapt it in every way, compare: benchmarks/study.py
# make orderings    which of the papers' orderings of objectives hold at that size: benchmarks/orderings.py
# make transfer     fine-tune a packaged BERT on GLUE in T5X_LITE_DATA_DIR: benchmarks/transfer.py; with transformers, too:
#                   TRANSFER_FLAGS="--torch=/path/bin/python"
# make lint         ruff and pyright
# make docs         build the pages under docs/ into site/; a broken link or a page outside the navigation is an error
# make venv         only set up .venv: nothing is done when it is up to date
# make cache TASK=c4_v220_span_corruption CACHE_DIR=/data/cache
#                   write a task's tokens, once for all runs, with Apache Beam (in .venv-cache); TASK may be a mixture,
#                   or several names with commas. CACHE_FLAGS adds to it: --overwrite, --vocabulary=FILE,
#                   --pipeline_options=--runner=DataflowRunner,--project=... (the local runner otherwise)
# PYTHON=python3.12 picks the Python that .venv is made with (the newest supported one on PATH otherwise), and
# VENV=folder another place for it: `make test-core VENV=.venv-3.13 PYTHON=python3.13`.

VENV := .venv
BIN := $(VENV)/bin
CACHE_VENV := .venv-cache
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: venv quickstart test test-core test-slow test-exhaustive torture study orderings transfer lint docs cache clean

venv: $(VENV)/installed

quickstart: venv
	$(BIN)/python run.py --gin_file=quickstart.gin

test: venv
	$(BIN)/python -m pytest -m "not slow and not exhaustive" $(PYTEST_FLAGS)

test-core: venv
	$(BIN)/python -m pytest tests/core -m "not slow and not exhaustive" $(PYTEST_FLAGS)

test-slow: venv
	$(BIN)/python -m pytest -m "slow and not exhaustive" $(PYTEST_FLAGS)

test-exhaustive: venv
	$(BIN)/python -m pytest -m exhaustive $(PYTEST_FLAGS)

torture: venv
	$(BIN)/python tests/torture.py --kills=$(or $(KILLS),100) $(if $(PROCESSES),--processes=$(PROCESSES))

study: venv
	$(BIN)/python benchmarks/study.py $(STUDY_FLAGS)

orderings: venv
	$(BIN)/python benchmarks/orderings.py $(ORDERINGS_FLAGS)

transfer: venv
	$(BIN)/python benchmarks/transfer.py $(TRANSFER_FLAGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

cache: $(if $(and $(TASK),$(CACHE_DIR)),$(CACHE_VENV)/installed)
	@if [ -z "$(and $(TASK),$(CACHE_DIR))" ]; then \
	  echo "Say what to cache, and where: make cache TASK=glue_rte_v002 CACHE_DIR=/data/cache" >&2; exit 2; fi
	@$(CACHE_VENV)/bin/python -m tasks.cache --tasks=$(TASK) --output_cache_dir=$(CACHE_DIR) $(CACHE_FLAGS)

clean:
	rm -rf $(VENV) $(CACHE_VENV)

# The first of these that runs, and is of a version that the pinned packages are built for: the newest first.
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)

$(VENV)/installed: PACKAGES := requirements-dev.txt
$(VENV)/installed: $(REQUIREMENTS)
# Beam asks for older versions of these than are pinned.
$(CACHE_VENV)/installed: UNPINNED := beartype|numpy|pillow|protobuf|pyarrow|python-dateutil|sentencepiece
$(CACHE_VENV)/installed: PACKAGES := requirements-cache.txt
$(CACHE_VENV)/installed: requirements.txt requirements-cache.txt constraints.txt

PIP = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt

$(VENV)/installed $(CACHE_VENV)/installed:
	@set -e; chosen=; \
	for candidate in $(CANDIDATES); do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    chosen=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "t5x_lite needs Python 3.11, 3.12 or 3.13; none of these is one: $(CANDIDATES)." >&2; \
	  for candidate in $(CANDIDATES); do \
	    if found=$$($$candidate --version 2>/dev/null); then echo "  $$candidate is $$found" >&2; fi; \
	  done; \
	  echo "Install one, or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! $$chosen -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$chosen cannot make virtual environments: its venv module is missing." >&2; \
	  echo "On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(@D) with $$chosen, $$($$chosen --version): a download of some 1 GB and a few minutes, this time only."; \
	$$chosen -m venv --clear $(@D)
	@grep -vE '^($(or $(UNPINNED),none))==' constraints.txt > $(@D)/constraints.txt
	@$(PIP) --only-binary editdistance editdistance 2>/dev/null || $(@D)/bin/python -m pip install --quiet \
	  --disable-pip-version-check ./shims/editdistance
	@$(PIP) --requirement $(PACKAGES)
	@$(PIP) --no-deps --editable .
	@touch $@
