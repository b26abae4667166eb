"""The job of end_to_end.py: a random Llama with its tokenizer, and rows of random token ids.

Both come from a seed, so that anyone has the same, offline. Random weights cost what trained ones
do; what the heads learn from them means nothing.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """What every runner does; everything but `tokens` is that of the job's folder name."""

    tokens: int
    """Activations to train on, in whole batches."""
    d_model: int = 256
    n_layers: int = 4
    vocab: int = 4096
    ctx_len: int = 128
    """Tokens per row, BOS first."""
    lm_batch_seqs: int = 32
    """Rows per forward pass of the LM."""
    layer: int = 1
    """The hook point is the output of this block."""
    d_sae: int = 4096
    k: int = 32
    batch_tokens: int = 4096
    buffer_tokens: int = 65_536
    """Activations that are shuffled, where a runner shuffles."""
    seed: int = 0
    n_heads: int = 4
    n_kv_heads: int = 4

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Rows of text: one pass for every runner, with its buffer and a validation set."""
        return (self.tokens + self.buffer_tokens) // (self.ctx_len - 1) * 11 // 10 + 512

    @property
    def name(self) -> str:
        """Its folder."""
        shape = (self.d_model, self.n_layers, self.vocab, self.ctx_len, self.rows, self.seed)
        return "job-" + "-".join(map(str, shape))


def lm_folder(folder: Path) -> Path:
    """Where the Llama of a job is."""
    return folder / "random-llama"


def rows_file(folder: Path) -> Path:
    """Where the token ids of a job are: column `input_ids`, one row of text each."""
    return folder / "rows.parquet"


def build(job: Job, cache: Path) -> Path:
    """The folder of a job, made if it is not there."""
    folder = cache / job.name
    finished = folder / "job.json"
    if not finished.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _build_lm(job, lm_folder(folder))
        _build_rows(job, rows_file(folder))
        finished.write_text(json.dumps(job._asdict(), indent=2) + "\n")
    return folder


def _build_lm(job: Job, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(job.vocab - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=job.vocab,
        hidden_size=job.d_model,
        intermediate_size=4 * job.d_model,
        num_hidden_layers=job.n_layers,
        num_attention_heads=job.n_heads,
        num_key_value_heads=job.n_kv_heads,
        max_position_embeddings=2 * job.ctx_len,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def _build_rows(job: Job, path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = np.random.default_rng(job.seed).integers(3, job.vocab, (job.rows, job.ctx_len))
    ids[:, 0] = 0
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
