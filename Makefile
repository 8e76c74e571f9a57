# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow bench bench-plan bench-gpu lint clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: $(STAMP)  ## compress, evaluate and query a served model on the embedded model
	BIN=$(BIN) sh benchmarks/demo.sh

# Every core that is granted, one thread each; a worker that is done takes tests from another.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: $(STAMP) lint  ## everything that runs without GPU and network, in under 10 minutes on 2 cores
	$(PYTEST) -m 'not slow'

test-slow: $(STAMP)  ## the minutes-long checks too
	$(PYTEST)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.compress_cost
	$(BIN)/python -m benchmarks.encode_speed

# make bench-plan MODEL=DIR DATA="--data books=FILE --data code=FILE" PLOT=plan.png WORK=DIR
MODEL ?= demo
PLOT ?= plan-policies.png
bench-plan: $(STAMP)  ## every policy at equal bytes, carried out and measured; two minutes on the demo
	$(BIN)/python -m benchmarks.plan_policies $(MODEL) $(DATA) $(if $(WORK),--work $(WORK)) --plot $(PLOT)
	$(BIN)/python -m benchmarks.plan_scale

# needs a GPU, torch built for it and triton; nothing is installed: make bench-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
bench-gpu:  ## kernels' speed on this GPU in under nine minutes; kernels_gpu.json to $$OUT or here
	$(GPU_PYTHON) -m benchmarks.kernels_gpu --out $(or $(OUT),.)/kernels_gpu.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bitnest

clean:
	rm -rf $(VENV) build dist *.egg-info
