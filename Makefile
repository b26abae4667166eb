# One command each, from an empty clone: no edit, no account, no download beyond Python packages.
PY := .venv/bin/python

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
	$(PY) -m pytest

test-slow: .venv/.ok
	$(PY) -m pytest -m "slow and not gpu"

lint: .venv/.ok
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ok
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
