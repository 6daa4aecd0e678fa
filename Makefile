# Every target sets up what it needs and leaves alone what is there already. On a fresh machine: Rust,
# a C++ compiler and Python >= 3.11 with venv.

PYTHON ?= python3
BIN := .venv/bin

# XLA's headers come from the wheel that pyproject.toml pins.
JAXLIB := $(shell grep -o 'jaxlib==[0-9.]*' pyproject.toml)
export XLA_FFI_INCLUDE_DIR := $(CURDIR)/.build/jaxlib/include
HEADERS := .build/jaxlib/include/xla/ffi/api/ffi.h

SOURCES := pyproject.toml hatch_build.py Cargo.toml Cargo.lock \
	$(shell find kernels ffi xla_plugin python -type f ! -name '*.pyc')

.PHONY: help demo test lint bench bench-gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/make \1\t\2/p' Makefile

demo: .venv/installed-examples  ## train a small GPT with plain residuals, HC and mHC
	$(BIN)/python examples/train_gpt.py

test: lint  ## run all checks and tests of Rust and Python
	CXXFLAGS=-Werror cargo test --locked --workspace
	$(BIN)/python -m pytest
	@echo "All tests passed. Next: make demo, or docs/architecture.md for how it works."

lint: .venv/installed-test,dev,examples  ## run the formatters' and linters' checks and the type checker
	cargo fmt --check
	CXXFLAGS=-Werror cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed-bench  ## compare the fused kernels with plain JAX; writes benches/results/
	$(BIN)/python benches/cpu.py

bench-gpu: .venv/installed-bench,cuda13  ## the same on an NVIDIA GPU with a driver for CUDA 13; some minutes
	$(BIN)/python benches/gpu.py

clean:  ## remove everything that these targets made
	rm -rf .venv .build target demo .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Without build isolation: the headers are here already, and pip would fetch all of jaxlib again.
.venv/installed-%: $(SOURCES) | $(HEADERS)
	@echo "Installing jax-mhc[$*]; the first time takes a minute or two."
	$(BIN)/pip install --quiet --no-build-isolation '.[$*]'
	@touch $@

$(HEADERS): | .venv/ready
	$(BIN)/pip download --quiet --no-deps --dest .build $(JAXLIB)
	$(BIN)/python -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	  wheel.extractall(".build", [n for n in wheel.namelist() if n.startswith("jaxlib/include/")])' \
	  .build/$(subst ==,-,$(JAXLIB))-*.whl

.venv/ready:
	@for tool in cargo c++; do command -v $$tool > /dev/null || \
	  { echo "$$tool is missing: jax-mhc needs Rust and a C++ compiler" >&2; exit 1; }; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: run make PYTHON=<a newer python>" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet hatchling
	@touch $@
