# `make demo` and `make test` set up everything they need on a fresh machine.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
FROM :=
DEMO ?= $(if $(FROM),runs/demo_from,runs/demo)
WHEELS ?= wheels
DEVICE ?= cuda
GPU ?= runs/gpu
BASELINE ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RENDERING := scripts/with_rendering.sh $(PY)
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test lint docs learn soak gpu wheels install clean clean-demo

help:
	@echo "make demo    videos -> pre-training -> fine-tuning -> evaluation -> report, in $(DEMO);"
	@echo "             FROM=models/toy_prelar_plus begins with the world model that is shipped"
	@echo "make test    run the tests"
	@echo "make learn   learning check on the toy env, results in results/ (15 minutes)"
	@echo "make soak    two hours in which workers are killed and hang, results in results/soak"
	@echo "make lint    ruff (rules, format) and pyright (types)"
	@echo "make docs    the pages of docs/ and the API as a site, build/site/index.html"
	@echo "make gpu     what a GPU gives: tests, times, rendering, in $(GPU), 9 minutes; DEVICE=cpu rehearses"
	@echo "make wheels  collect what make gpu needs on a machine with torch and no network, in $(WHEELS)"
	@echo "make clean   remove $(VENV), $(DEMO) and caches"
	@echo "Each sets up $(VENV) first if needed. Another interpreter: make PYTHON=python3.12 ..."

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: give an interpreter, e.g. make PYTHON=python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" -V) is too old: Python 3.11 or later is needed, e.g. make PYTHON=python3.11"; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV): on Debian, apt-get install python3-venv"; exit 1; }

# torch comes first and by its exact version: a later, unpinned install may take another build.
$(STAMP): setup.cfg pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV) (a minute or two)"
	$(PY) -m pip install --quiet -c constraints.txt setuptools "$(TORCH)"
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test,docs,loggers,flow]'
	@touch $(STAMP)

install: $(STAMP)
	@:

test: install
	@$(RENDERING) $(PY) -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "build/site/index.html"

demo: install
	@$(RENDERING) scripts/demo.sh $(PY) $(DEMO) $(FROM)

soak: install
	@$(RENDERING) $(PY) benchmarks/soak.py

learn: install
	@$(RENDERING) $(PY) benchmarks/learn_toy.py

# Not by `install`: the machine may have no network, and its torch is to be used.
gpu:
	@scripts/gpu.sh "$(if $(wildcard $(PY)),$(PY),$(PYTHON))" "$(WHEELS)" "$(DEVICE)" "$(GPU)" $(if $(BASELINE),--baseline '$(BASELINE)')

wheels: install
	@scripts/wheels.sh $(PY) "$(WHEELS)"

clean-demo:
	rm -rf $(DEMO)

clean: clean-demo
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
