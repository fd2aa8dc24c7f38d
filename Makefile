# Every target sets up what it needs, in virtual environments of its own below this folder.
PYTHON ?= python3
ARGS ?=
SERVE := .venv/serve
DEV := .venv/dev
OPENPI := .venv/openpi

.DEFAULT_GOAL := help
.PHONY: help serve test check format demo bench clean

help:  ## Say what there is.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /make \1\t/' | expand -t 16

serve: $(SERVE)/.ready  ## Serve the bundled policies on http://127.0.0.1:8000 (more options: make serve ARGS="--port 9000").
	$(SERVE)/bin/policy-server serve models/zoo --default point-maze $(ARGS)

test: $(DEV)/.ready $(OPENPI)/.ready check  ## Check the code, then run every test.
	OPENPI_PYTHON=$(OPENPI)/bin/python $(DEV)/bin/python -m pytest $(ARGS)

check: $(DEV)/.ready  ## Format, lint, types, import rules.
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

format: $(DEV)/.ready  ## Mend what a formatter can.
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

demo: $(DEV)/.ready  ## Drive the simulators against a server over the network; writes pictures to docs/images.
	$(DEV)/bin/python -m policy_sim.demo
	$(DEV)/bin/python -m policy_sim.meta_world_demo

bench: $(DEV)/.ready $(OPENPI)/.ready  ## Measure; writes docs/benchmarks.md. OPENPI_SOURCE names a checkout of openpi to compare with.
	OPENPI_PYTHON=$(OPENPI)/bin/python $(DEV)/bin/python -m benchmarks $(ARGS)

clean:  ## Remove the virtual environments and caches.
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(SERVE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[serve]"
	touch $@

$(DEV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The stock openpi client needs numpy 1, and imports typing_extensions without declaring it.
$(OPENPI)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OPENPI)
	$(OPENPI)/bin/python -m pip install --quiet "openpi-client==0.1.2" typing_extensions "numpy<2" --editable ".[sim]"
	touch $@
