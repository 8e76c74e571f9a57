# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow bench lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: $(STAMP)  ## compress, evaluate and query a served model on the embedded model
	BIN=$(BIN) sh benchmarks/demo.sh

test: $(STAMP) lint  ## everything that runs without GPU and network, in under 20 minutes
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(STAMP)  ## the minutes-long checks too
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m benchmarks.compress_cost
	$(BIN)/python -m benchmarks.encode_speed

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bitnest

clean:
	rm -rf $(VENV) build dist *.egg-info
