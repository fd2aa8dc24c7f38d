# Every target sets up what it needs, in virtual environments of its own below this folder.
PYTHON ?= python3
ARGS ?=
SERVE := .venv/serve
DEV := .venv/dev
OPENPI := .venv/openpi
GATEWAY := .venv/gateway
TRITON := .venv/triton
TRITON_REPO := triton_repo
CPP_PACKAGES := cmake doctest-dev g++ libboost-dev libmsgpack-cxx-dev

.DEFAULT_GOAL := help
.PHONY: help serve serve-triton test cpp-packages check format demo bench clean

help:  ## Say what there is.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /make \1\t/' | expand -t 16

serve: $(SERVE)/.ready  ## Serve the bundled policies on http://127.0.0.1:8000 (more options: make serve ARGS="--port 9000").
	$(SERVE)/bin/policy-server serve models/zoo --default point-maze $(ARGS)

serve-triton: $(GATEWAY)/.ready $(TRITON)/.ready  ## The same on a real Triton server, which runs beside the gateway.
	$(GATEWAY)/bin/policy-server export triton models/zoo -o $(TRITON_REPO)
	$(TRITON)/bin/python -m policy_server.triton $(TRITON_REPO) & triton=$$!; trap "kill $$triton" EXIT INT TERM; \
	$(GATEWAY)/bin/policy-server serve models/zoo --engine triton --default point-maze $(ARGS)

test: $(DEV)/.ready $(OPENPI)/.ready $(TRITON)/.ready cpp-packages check  ## Check the code, then run every test.
	OPENPI_PYTHON=$(OPENPI)/bin/python TRITON_PYTHON=$(TRITON)/bin/python $(DEV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What the tests of the C++ client build with. Without it they are skipped, and say so.
cpp-packages:
	@dpkg -s $(CPP_PACKAGES) >/dev/null 2>&1 || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CPP_PACKAGES); \
	else echo "to test the C++ client as well, install $(CPP_PACKAGES)"; fi

check: $(DEV)/.ready  ## Format, lint, types, import rules.
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/hadolint Dockerfile
	$(DEV)/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml

format: $(DEV)/.ready  ## Mend what a formatter can.
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

demo: $(DEV)/.ready  ## Drive the simulators against a server over the network; writes pictures to docs/images.
	$(DEV)/bin/python -m policy_sim.demo
	$(DEV)/bin/python -m policy_sim.meta_world_demo

bench: $(DEV)/.ready $(OPENPI)/.ready $(TRITON)/.ready  ## Measure; writes docs/benchmarks.md. OPENPI_SOURCE names a checkout of openpi to compare with.
	OPENPI_PYTHON=$(OPENPI)/bin/python TRITON_PYTHON=$(TRITON)/bin/python $(DEV)/bin/python -m benchmarks $(ARGS)

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

# The gateway alone: neither torch nor any engine.
$(GATEWAY)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GATEWAY)
	$(GATEWAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[gateway,triton]"
	touch $@

# NVIDIA's wheel of the server wants numpy 1, and with it an older OpenCV. Its own client library is not needed.
$(TRITON)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRITON)
	grep -vE '^(numpy|opencv-python-headless)==' constraints.txt > $(TRITON)/constraints.txt
	$(TRITON)/bin/python -m pip install --quiet --constraint $(TRITON)/constraints.txt --editable ".[triton-backend]"
	$(TRITON)/bin/python -m pip install --quiet --no-deps "nvidia-pytriton==0.7.0"
	touch $@

# The stock openpi client needs numpy 1, and imports typing_extensions without declaring it.
$(OPENPI)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OPENPI)
	$(OPENPI)/bin/python -m pip install --quiet "openpi-client==0.1.2" typing_extensions "numpy<2" --editable ".[sim]"
	touch $@
