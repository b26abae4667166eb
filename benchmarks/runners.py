"""Trains a TopK head in one process: ours, SAELens or sparsify; started by end_to_end.py.

    python benchmarks/runners.py NAME '{"tokens": 397312}' JOB_FOLDER SCRATCH_FOLDER RESULT.json

Each is the project's own entry point with its own defaults; what is set is what the job says (LM,
text, hook point, head, batch, budget), and that no peer sends anything to W&B. One clock serves
all: it looks at the end of every optimizer step of the process.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from benchmarks.job import Job, lm_folder, rows_file  # noqa: E402


class Clock:
    """Time, tokens the LM was given, and peak memory, at the end of every optimizer step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.lm_tokens: list[int] = []
        self.peak_kib = 0
        self._embedded = 0
        register_optimizer_step_post_hook(self._step_ended)
        embed = torch.nn.Embedding.forward

        def counted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            self._embedded += ids.numel()
            return embed(module, ids)

        torch.nn.Embedding.forward = counted  # type: ignore[method-assign]

    def _step_ended(self, *_: object) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.lm_tokens.append(self._embedded)
        # not getrusage, whose peak a child takes over from its parent
        status = Path("/proc/self/status").read_text()
        self.peak_kib = int(status.split("VmHWM:")[1].split()[0])

    def found(self, batch_tokens: int) -> dict[str, Any]:
        """Figures of the span from the end of the first step to the end of the last one."""
        seconds = self.ends[-1] - self.ends[0]
        tokens = (len(self.ends) - 1) * batch_tokens
        return {
            "steps": len(self.ends),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_cpu_second": tokens / (self.cpu[-1] - self.cpu[0]),
            "lm_tokens_per_token": (self.lm_tokens[-1] - self.lm_tokens[0]) / tokens,
            "peak_rss_mib": self.peak_kib / 1024,
        }


def our_arguments(job: Job, folder: Path, run: Path) -> list[str]:
    """What a person would type after `python train.py` for the job; all callbacks stay on."""
    corpus = {
        "class_path": "kanllama_lightning.corpus.LocalCorpus",
        "init_args": {
            "path": str(rows_file(folder)),
            "column": "input_ids",
            "tokenizer": lm_folder(folder).name,
        },
    }
    values = {
        "lm.name": lm_folder(folder),
        "lm.revision": "null",
        "lm.hook_point": f"model.layers.{job.layer}",
        "lm.dtype": "float32",
        "lm.untrained": "true",
        "model.head.d_sae": job.d_sae,
        "model.head.target_l0": job.k,
        "model.tokens": job.tokens,
        "model.sae_batch_tokens": job.batch_tokens,
        "model.start_tokens": job.buffer_tokens,
        "model.buffer.capacity_tokens": job.buffer_tokens,
        "model.buffer.dtype": "float32",
        "data.train": json.dumps(corpus),
        "data.val": "null",
        "data.val_tokens": 64 * job.ctx_len,
        "data.append_eos": "false",
        "data.ctx_len": job.ctx_len,
        "data.lm_batch_seqs": job.lm_batch_seqs,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.val_check_interval": 1_000_000,
        "run": run,
    }
    config = str(ROOT / "configs" / "topk.yaml")
    return ["fit", "--config", config, *(f"--{name}={value}" for name, value in values.items())]


def ours(job: Job, folder: Path, scratch: Path) -> dict[str, Any]:
    """`train.py fit`: Lightning, offline W&B, every callback, clipping, AuxK."""
    from train import main

    run = scratch / "ours"
    code = main(our_arguments(job, folder, run))
    if code:
        raise SystemExit(code)
    return {"summary": json.loads((run / "summary.json").read_text())}


def saelens(job: Job, folder: Path, scratch: Path) -> dict[str, Any]:
    """SAELens' LanguageModelSAETrainingRunner with the Llama as a transformers model."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=job.d_model, d_sae=job.d_sae, k=job.k),
        model_name=str(lm_folder(folder)),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{job.layer}",
        context_size=job.ctx_len,
        training_tokens=job.steps * job.batch_tokens,
        train_batch_size_tokens=job.batch_tokens,
        store_batch_size_prompts=job.lm_batch_seqs,
        n_batches_in_buffer=job.buffer_tokens // job.ctx_len,  # counted in rows of text
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(scratch / "saelens"),
    )
    dataset = Dataset.from_dict({"input_ids": read_rows(folder)})
    LanguageModelSAETrainingRunner(config, override_dataset=dataset).run()
    return {}


def sparsify(job: Job, folder: Path, scratch: Path) -> dict[str, Any]:
    """sparsify's Trainer as its command line calls it, with Adam; it shuffles no activations."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModel

    config = TrainConfig(
        SparseCoderConfig(num_latents=job.d_sae, k=job.k),
        batch_size=job.batch_tokens // job.ctx_len,
        optimizer="adam",
        hookpoints=[f"layers.{job.layer}"],
        log_to_wandb=False,
        save_dir=str(scratch / "sparsify"),
    )
    rows = read_rows(folder)[: job.steps * config.batch_size]
    dataset = Dataset.from_dict({"input_ids": rows}).with_format("torch")
    Trainer(config, dataset, AutoModel.from_pretrained(lm_folder(folder))).fit()
    return {}


def read_rows(folder: Path) -> list[list[int]]:
    """Token ids of a job."""
    import pyarrow.parquet as pq

    rows: list[list[int]] = pq.read_table(rows_file(folder)).column("input_ids").to_pylist()
    return rows


RUNNERS: dict[str, Callable[[Job, Path, Path], dict[str, Any]]] = {
    "ours": ours,
    "saelens": saelens,
    "sparsify": sparsify,
}


def main() -> None:
    """Run one and write what the clock found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(RUNNERS))
    parser.add_argument("job", type=json.loads, help="fields of Job")
    parser.add_argument("folder", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="sae_lens")
    job = Job(**args.job)
    clock = Clock()
    found = RUNNERS[args.name](job, args.folder, args.scratch)
    args.result.write_text(json.dumps(clock.found(job.batch_tokens) | found) + "\n")


if __name__ == "__main__":
    main()
