# One command each, from an empty clone: no edit, no account, no download beyond Python packages.
PY := .venv/bin/python
# one core to a process; every process has a finished run and imports of its own
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo record watch test test-slow lint format
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's,^([a-z-]+):.*## (.*),\1|\2,' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv/.ok: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/.ok  ## train a KAN SAE on the embedded model: four minutes, and as many before for .venv
	$(PY) train.py fit --config configs/kan.yaml --config configs/embedded.yaml

record: .venv/.ok  ## the research record of that run, in its folder eval/
	$(PY) evaluate.py report last

watch: .venv/.ok  ## the newest log of the runs, in the terminal, as W&B shows it: no account
	@log=$$(ls -td runs/*/wandb/*run-*/ 2>/dev/null | head -n 1); \
	if [ -n "$$log" ]; then .venv/bin/wandb leet run "$$log"; else echo "runs/ holds no run with a W&B log: make demo"; exit 2; fi

test: .venv/.ok  ## the tests for every commit
	$(PYTEST)

test-slow: .venv/.ok  ## the tests that take long
	$(PYTEST) -m "slow and not gpu"

lint: .venv/.ok  ## format, imports, names and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ok  ## mend what lint can mend
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
