# One command each, from an empty clone: no edit, no account, no download beyond Python packages.
PY := .venv/bin/python
# one core to a process; every process has a finished run and imports of its own
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo record test test-slow lint format
.DEFAULT_GOAL := demo

.venv/.ok: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/.ok
	$(PY) train.py fit --config configs/kan.yaml --config configs/embedded.yaml

record: .venv/.ok
	$(PY) evaluate.py report last

test: .venv/.ok
	$(PYTEST)

test-slow: .venv/.ok
	$(PYTEST) -m "slow and not gpu"

lint: .venv/.ok
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ok
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
