# make demo     permuted MNIST with no, exact and generative replay, small enough for a laptop
# make test     the tests                  make test-slow   the long ones, such as kills at random moments
# make bench    how fast training is, beside the usual way of writing it
# make gpu      what only a GPU can tell: tests, speed and runs, nine minutes a call (not run on a GPU yet)
# make figures  arts/RESULTS.md and its figures, from the kept data
# All of them make .venv first, with PYTHON (default: python3).

PYTHON ?= python3
PY := .venv/bin/python
DEMO ?= --recipe=demo --seed 0 --jobs 2
# One test process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto

.PHONY: demo test test-slow bench gpu figures clean

demo: .venv/installed
	$(PY) run_full_experiments permutated-mnist $(DEMO)

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PYTEST)

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

bench: .venv/installed
	$(PY) benchmarks/bench.py

gpu: .venv/installed-dev
	$(PY) benchmarks/gpu.py $(GPU)

figures: .venv/installed
	$(PY) arts/figures.py

# Where requirements.txt leaves visdom out, install it separately: its last version for Python 3.11, the usual one for 3.15.
PY311 := requirements-visdom-py311.txt
PIP := $(PY) -m pip install --disable-pip-version-check
IS = $(PY) -c 'import sys; sys.exit(not sys.version_info $(1))'

.venv/installed: requirements.txt $(PY311)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "this needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	if $(call IS,< (3, 12)); then PIP_CONSTRAINT=$(PY311) PIP_BUILD_CONSTRAINT=$(PY311) $(PIP) -r $(PY311); fi
	if $(call IS,>= (3, 15)); then $(PIP) --no-deps 'visdom>=0.3.0'; fi
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
