# Two commands do all the set-up: `make demo` and `make test`. Both need Python 3.10+, make and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
KERNEL_SOURCES := $(wildcard kernels/*.cpp kernels/*.h kernels/*.inc)
DEMO_DIR ?= demo

.PHONY: demo test sync notebooks pytest kernels prep lessons clean bench-training
.DEFAULT_GOAL := test

# The environment, remade when what it is made from changes; `pip install -e` also compiles the kernels.
.venv/.installed: settings.ini setup.py pyproject.toml $(KERNEL_SOURCES)
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3,10))' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3,10) else "fastsparse needs Python 3.10 or newer: make PYTHON=...")' && \
	  $(PYTHON) -m venv --clear .venv; }
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	FASTSPARSE_REQUIRE_KERNELS=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

demo: .venv/.installed
	fastsparse train --data digits --out "$(DEMO_DIR)"

test: sync notebooks pytest

# The package is exactly what the notebooks say.
sync: .venv/.installed
	$(BIN)/python tests/check_sync.py

# One thread a process: two OpenMP pools on few cores slow each other down.
notebooks: .venv/.installed
	OMP_NUM_THREADS=1 nbdev-test --n-workers 2

pytest: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests

# For contributors: regenerate the package after editing notebooks.
prep: .venv/.installed
	nbdev-export && nbdev-clean

# Run the notebooks and keep what their cells show, for those who read them where nothing runs. Timings are this machine's.
lessons: .venv/.installed
	cd nbs && for n in *.ipynb; do OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore exec_nb $$n --dest $$n --exc-stop || exit 1; done
	nbdev-clean

kernels: .venv/.installed
	FASTSPARSE_REQUIRE_KERNELS=1 $(BIN)/python setup.py build_ext --inplace

clean:
	rm -rf .venv build dist *.egg-info demo fastsparse/*.so

# Whole training steps, sparse against dense; see also bench-kernels.
bench-training: .venv/.installed
	$(BIN)/python bench/bench_training.py
	$(BIN)/python bench/bench_memory.py

-include kernels/targets.mk
