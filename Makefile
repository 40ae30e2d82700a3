# make demo   permutated MNIST with no, exact and generative replay at a size for a laptop, with figure and samples
# make test   the tests
# Both make .venv first, with PYTHON (default: python3).

PYTHON ?= python3
PY := .venv/bin/python
DEMO ?= --quick --seed 0

.PHONY: demo test lint figures clean

demo: .venv/installed
	$(PY) run_full_experiments permutated-mnist $(DEMO)

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

# Python 3.11 gets its visdom, the last one for it, in a step of its own; later ones have it in requirements.txt.
PY311 := requirements-visdom-py311.txt

.venv/installed: requirements.txt $(PY311)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	if $(PY) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		PIP_CONSTRAINT=$(PY311) PIP_BUILD_CONSTRAINT=$(PY311) \
		$(PY) -m pip install --disable-pip-version-check -r $(PY311); fi
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
