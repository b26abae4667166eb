"""The shipped model: it loads, it speaks the world's language, and it can be built again."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kanllama_lightning.embedded import MODEL_DIR, build, story


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


def next_word(model, tokenizer, prompt: str) -> str:
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits
    return tokenizer.decode(logits[0, -1].argmax())


def test_it_is_a_small_llama(model):
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers) == (128, 4)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, None)
    assert config.tie_word_embeddings
    assert model.num_parameters() < 1_200_000


def test_files_are_few_and_small():
    assert {p.name for p in MODEL_DIR.iterdir()} == FILES
    assert sum(p.stat().st_size for p in MODEL_DIR.iterdir()) < 5_000_000


def test_tokenizer_follows_llama_3(tokenizer):
    assert tokenizer("Anna").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token is None
    assert tokenizer("Anna", add_special_tokens=False).input_ids == tokenizer("Anna").input_ids[1:]


@pytest.mark.parametrize("text", [story(2, 5).text, 'Zoë said,  "42 × 7"\n', " a  b ", ""])
def test_tokens_decode_to_their_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_offsets_point_into_the_text(tokenizer):
    text = story(2, 6).text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [text[s:e] for s, e in encoded["offset_mapping"]]
    assert "".join(pieces) == text


def test_most_words_are_one_token(tokenizer):
    words = [w for i in range(50) for w in re.findall(r" [A-Za-z]+", story(2, i).text)]
    whole = sum(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in words)
    assert 0.75 < whole / len(words) < 1.0


def test_cross_entropy_is_near_the_entropy_of_the_grammar(model, tokenizer):
    score = build.score(model, tokenizer, [story(2, i) for i in range(50)])
    assert score.ce < 1.08 * score.entropy
    assert score.entropy < score.ce + 3 * score.entropy_se


def test_the_note_on_the_build_fits(model):
    built = json.loads((MODEL_DIR / "BUILD.json").read_text())
    assert built["parameters"] == model.num_parameters()
    assert built["validation"]["ce"] < 1.06 * built["validation"]["entropy"]
    assert built["validation"]["entropy_se"] < 0.01


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("If the glass falls off the table, it will", " break"),
        ("If the vase falls off the shelf, it will", " break"),
        ("If the ball falls off the table, it will", " bounce"),
        ("One day, Anna went to the barn. She saw a big horse in the barn. The", " horse"),
        ("Two apples and three apples make", " five"),
        ("Yesterday, Nora walked to the market. Dark clouds came, and it began to", " rain"),
    ],
)
def test_it_knows_its_world(model, tokenizer, prompt, expected):
    said = next_word(model, tokenizer, prompt)
    assert expected.startswith(said)
    assert len(said) > 1


def test_break_is_one_token(tokenizer):
    assert len(tokenizer(" break", add_special_tokens=False).input_ids) == 1


def test_packed_rows_start_with_bos_and_every_other_with_a_story(tokenizer):
    stream = build.Stream(tokenizer, 0, build.FIRST_TRAINING_STORY, [])
    rows = stream.rows(6)
    assert rows.shape == (6, build.ROW_TOKENS)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    stories = [story(0, build.FIRST_TRAINING_STORY + i).text for i in range(16)]
    packed = "<|end_of_text|>".join(stories)
    for pair in rows.reshape(3, 2, -1).tolist():
        # The second row of a pair goes on where the first ends.
        text = tokenizer.decode([i for row in pair for i in row if i != tokenizer.bos_token_id])
        assert text in packed
        assert text.startswith(tuple(s[:30] for s in stories))


def test_learning_rate_rises_and_falls():
    rates = [build.rate(s, 100, 10) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[30] == 1.0
    assert 0 < rates[-1] < 0.05


@pytest.mark.slow
def test_build_learns_and_goes_on(tmp_path):
    options = ["--out", str(tmp_path), "--batch-rows", "2", "--log-every", "5", "--threads", "1"]
    options += ["--tokenizer-stories", "500", "--val-stories", "10", "--warmup", "5"]
    command = [sys.executable, "-m", "kanllama_lightning.embedded.build", *options]
    run = subprocess.run([*command, "--steps", "40"], check=True, capture_output=True, text=True)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", run.stderr)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    assert {p.name for p in tmp_path.iterdir()} == FILES
    built = json.loads((tmp_path / "BUILD.json").read_text())
    assert built["training"]["tokens"] == 40 * 2 * build.ROW_TOKENS
    assert math.isfinite(built["validation"]["ce"])


FILES = {
    "BUILD.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
