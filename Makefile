# make demo   permutated MNIST with no, exact and generative replay at a size for a laptop, with figure and samples
# make test   the tests                               make test-slow   the long ones: kills at random moments
# make bench  how fast, beside the plain way          make figures     the README's figures and tables, from arts/runs
# make report one page on all runs below results: table, figures, commands (RUNS=... for others)
# All make .venv first, with PYTHON (default: python3).

PYTHON ?= python3
PY := .venv/bin/python
DEMO ?= --quick --seed 0
RUNS ?= results
# One test process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto

.PHONY: demo test test-slow bench figures report clean

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

figures: .venv/installed
	$(PY) arts/figures.py

report: .venv/installed
	$(PY) visual.py $(RUNS) --report results/report.html

# visdom comes in a step of its own where not in requirements.txt: the last one for Python 3.11, and for 3.15 the usual one.
PY311 := requirements-visdom-py311.txt
PIP := $(PY) -m pip install --disable-pip-version-check
IS = $(PY) -c 'import sys; sys.exit(not sys.version_info $(1))'

.venv/installed: requirements.txt $(PY311)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
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
