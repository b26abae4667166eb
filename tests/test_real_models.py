"""Slow: a real small Llama on real stories, and the shapes of Llama 3.2 1B with random weights."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kanllama_lightning.embedded import MODEL_DIR
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from tests.conftest import SHARED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def train(*args: str, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
    """`train.py` as a person runs it."""
    command = [sys.executable, "train.py", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.skipif(not SHARED.exists(), reason="the real model and text are not here")
@pytest.mark.parametrize("head", ["kan"])
def test_stories260k(head: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(
        *("fit", "--config", f"configs/{head}.yaml", "--config", "configs/embedded.yaml"),
        *("--lm.name", str(SHARED / "stories260K-hf"), "--lm.hook_point", "model.layers.2"),
        *("--data.train", str(SHARED / "tinystories_sample.jsonl"), "--run", str(folder)),
        *("--model.head.d_sae", "512", "--model.head.target_l0", "16", "--model.tokens", "400_000"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val/ce_tokens"] > 90_000
    assert summary["val/l0"] == pytest.approx(16, rel=0.05)
    assert summary["val/delta_ce_share"] < 0.2
    for control in ("PCA", "untrained_head"):
        assert summary["val/delta_ce"] < summary[f"baseline/{control}/delta_ce"]
    assert len(pd.read_csv(folder / "losses.csv")) > 0
    assert SAEHead.load(folder / "head").d_sae == 512


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.2 1B's shapes, random bf16 weights, the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("llama_1b")
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(default)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def test_llama_1b_shapes_fit_on_a_cpu(llama_1b: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    # without bf16 instructions the LM is many times faster in float32, at twice the memory
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    done = train(
        *("fit", "--config", "configs/kan.yaml", "--lm.name", str(llama_1b), "--lm.dtype", dtype),
        *("--lm.revision", "null", "--lm.untrained", "true", "--run", str(tmp_path / "run")),
        "--data.train={class_path: StoryWorldCorpus, init_args: {n_documents: 3000}}",
        *("--data.val", "null", "--data.ctx_len", "128", "--data.lm_batch_seqs", "8"),
        *("--data.val_tokens", "256", "--data.val_batch_seqs", "1", "--data.val_fraction", "0.1"),
        *("--model.tokens", "2048", "--model.sae_batch_tokens", "512"),
        *("--model.start_tokens", "2048", "--model.buffer.capacity_tokens", "4096"),
        *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
    )
    seconds = time.perf_counter() - began
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["d_sae"] == 16_384
    assert summary["steps"] == 4
    sys.stdout.write(f"\n1B shapes in {dtype}: {seconds:.0f} s, peak {peak_gib:.1f} GiB\n")
    assert seconds < 1500  # two busy cores; the lens alone is 8.6 TFLOP
    assert peak_gib < 20


@torch.inference_mode()
def test_capture_stops_at_the_hook(llama_1b: Path) -> None:
    lm = FrozenLM(str(llama_1b), "model.layers.0.mlp", dtype="bfloat16", untrained=True).load_()
    model = AutoModelForCausalLM.from_pretrained(llama_1b, dtype=torch.bfloat16)
    ids = torch.randint(2, 1000, (1, 32))
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[2]))
    model(ids, use_cache=False)
    handle.remove()
    assert torch.equal(seen[0], lm.acts(ids))
    ratios = []
    for _ in range(3):
        began = time.perf_counter()
        lm.acts(ids)
        middle = time.perf_counter()
        model(ids, use_cache=False)
        ratios.append((time.perf_counter() - middle) / (middle - began))
    sys.stdout.write(f"\nfull forward / capture at layer 0: {sorted(ratios)}\n")
    assert sorted(ratios)[1] > 10
