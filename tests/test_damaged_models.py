"""Models that are damaged, mislabelled or unfit, as people give them: one line, exit code 2.

And runs whose numbers stop being finite: they end, say since when, and spoil no checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kanllama_lightning.embedded import MODEL_DIR
from kanllama_lightning.heads import BatchTopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.runs.checkpoints import checkpoints, damage
from kanllama_lightning.storage.small_files import plain, write_json
from kanllama_lightning.training.module import SAEModule
from kanllama_lightning.types import InputError, Prefix, TokenBatch
from tests.conftest import Fit, only_run, rest_slow
from train import main

HOOKED = "model.layers.1.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]
Damaged = Callable[..., Path]


@pytest.fixture
def damaged(tmp_path: Path) -> Damaged:
    """Copies the embedded model, changes its weights in place and its configuration."""

    def make(change: Callable[[Weights], Any], **config: Any) -> Path:
        folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "lm"))
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        about = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(about))
        return folder

    return make


def test_a_pipe_in_the_place_of_weights_is_refused_and_not_waited_for(damaged: Damaged) -> None:
    folder = damaged(nothing)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: is no ordinary file"):
        FrozenLM(str(folder), "model.layers.1.mlp")


def train(folder: Path, tmp_path: Path, *extra: str) -> int:
    return main(
        [
            *("fit", "--config", "configs/kan.yaml", "--config", "configs/embedded.yaml"),
            *("--lm.name", str(folder), "--runs_dir", str(tmp_path / "runs")),
            *("--model.tokens", "20000", "--model.head.d_sae", "64"),
            *("--data.train.n_documents", "100", "--data.val_tokens", "2048"),
            *extra,
        ]
    )


def nothing(weights: Weights) -> None:
    pass


def spoil(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].view(-1)[7] = value

    return change


def rename(weights: Weights) -> None:
    weights["model.layers.1.mlp.down.weight"] = weights.pop(HOOKED)


def narrow(weights: Weights) -> None:
    weights[HOOKED] = weights[HOOKED][:, :-1].contiguous()


def one_token(weights: Weights) -> None:
    table = weights["model.embed_tokens.weight"]
    table.copy_(table[5].clone().expand_as(table))


def hot(weights: Weights) -> None:
    """The same function in float32; in float16 a product within the third MLP overflows."""
    weights["model.layers.2.mlp.up_proj.weight"].mul_(3e3)
    weights["model.layers.2.mlp.gate_proj.weight"].mul_(3e2)


LAYERS = "num_hidden_layers"
UP, QUERY = "model.layers.0.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"
BAD_WEIGHTS = {
    "missing": (lambda w: w.pop(HOOKED), {}, rf"missing from the file: {HOOKED}\."),
    "renamed": (rename, {}, rf"missing .*: {HOOKED}; in the file but .*1\.mlp\.down\.weight"),
    "shape": (narrow, {}, rf"{HOOKED} is \(128, 351\) in the file and \(128, 352\) by config"),
    "fewer layers": (nothing, {LAYERS: 3}, r"not in the model: model\.layers\.3.* 6 more"),
    "more layers": (nothing, {LAYERS: 5}, r"missing from the file: model\.layers\.4"),
    "before": (spoil(UP, torch.nan), {}, r"infinite .*0\.mlp\.up_proj.*1 of 45,056"),
    "behind": (spoil(QUERY, torch.inf), {}, r"infinite .*3\.self_attn\.q_proj"),
    "norm": (spoil("model.norm.weight", torch.nan), {}, r"model\.norm\.weight \(1 of 128 numb"),
    "no layers": (nothing, {LAYERS: -2}, "num_hidden_layers=-2 must .* at least 1"),
    "no width": (nothing, {"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_or_are_not_finite_are_named(damaged: Damaged, case: str) -> None:
    change, config, said = BAD_WEIGHTS[case]
    folder = damaged(change, **config)
    with pytest.raises(InputError, match=said):
        FrozenLM(str(folder), "model.layers.1.mlp").load_()


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BAD_KEYS = {
    "hidden_act='nope' must be the name of a function": {"hidden_act": "nope"},
    "hidden_act=None must be": {"hidden_act": None},
    "num_key_value_heads=0 must be a whole number of at least 1": {"num_key_value_heads": 0},
    "num_key_value_heads=3 must divide num_attention_heads=4": {"num_key_value_heads": 3},
    "head_dim=0 must be a whole number": {"head_dim": 0},
    "rms_norm_eps=None must be a finite number": {"rms_norm_eps": None},
    "rms_norm_eps='x' must be a finite number": {"rms_norm_eps": "x"},
    "rms_norm_eps=nan must be a finite number": {"rms_norm_eps": torch.nan},
    "rms_norm_eps=-1.0 must be a finite number of at least 0": {"rms_norm_eps": -1.0},
    "max_position_embeddings=-1 must be a whole number": {"max_position_embeddings": -1},
    "max_position_embeddings=None must be a whole number": {"max_position_embeddings": None},
    r"rope_parameters\.rope_type='bogus' must be one of default, linear": {
        "rope_parameters": ROPE | {"rope_type": "bogus"}
    },
    r"rope_scaling\.rope_type='bogus' must be": {"rope_scaling": {"type": "bogus"}},
    r"rope_parameters='x' must be an object": {"rope_parameters": "x"},
    r"rope_parameters\.rope_theta=0.* at least 1": {"rope_parameters": ROPE | {"rope_theta": 0}},
    r"rope_parameters\.factor=nan must": {"rope_parameters": ROPE | {"factor": torch.nan}},
    "rope_theta=-5.0 must be": {"rope_theta": -5.0},
    "vocab_size=True must be": {"vocab_size": True},
}


@pytest.mark.parametrize("said", BAD_KEYS)
def test_a_configuration_no_model_can_be_built_from_names_key_and_value(
    damaged: Damaged, said: str
) -> None:
    folder = damaged(nothing, **BAD_KEYS[said])
    whole = (
        rf"lm\.name='{folder}': .*config\.json: {said}.*; copy the model's own config\.json again$"
    )
    with pytest.raises(InputError, match=whole) as error:
        FrozenLM(str(folder), "model.layers.1.mlp")
    assert "\n" not in str(error.value)


BAD_FILES = {
    ("config.json", b"[1]"): "config.json: is a JSON list and no object",
    ("config.json", b"\xff\x00"): "config.json: is no text in UTF-8",
    ("config.json", None): "config.json: is missing",
    ("tokenizer_config.json", b"[]"): "tokenizer_config.json: is a JSON list and no object",
    ("tokenizer_config.json", b"{"): "tokenizer_config.json: is no valid JSON",
    ("tokenizer.json", b"{ no"): "tokenizer.json: is no valid JSON",
    ("tokenizer.json", b"{}"): "its tokenizer (tokenizer.json, tokenizer_config.json): ",
    ("tokenizer.json", None): "its tokenizer (tokenizer.json, tokenizer_config.json): ",
    ("special_tokens_map.json", b"{ no"): "special_tokens_map.json: is no valid JSON",
}


@pytest.mark.parametrize(("name", "content"), BAD_FILES)
def test_a_broken_file_of_a_model_is_named(
    damaged: Damaged, name: str, content: bytes | None
) -> None:
    folder = damaged(nothing)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        FrozenLM(str(folder), "model.layers.1.mlp")
    said = str(error.value)
    assert said.startswith(f"lm.name='{folder}': the folder holds no usable model: ")
    assert BAD_FILES[name, content] in said
    assert re.search(r"copy the model's own config\.json again$|Give a whole copy of one", said)
    assert "\n" not in said


def test_weights_in_another_order_with_what_nobody_needs_are_fine(damaged: Damaged) -> None:
    """A tied unembedding that is saved too, and tables that older versions saved."""

    def change(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    lm = FrozenLM(str(damaged(change)), "model.layers.1.mlp").load_()
    assert torch.equal(lm.model.lm_head.weight, lm.model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.int64, "I64"), (torch.float8_e4m3fn, "F8_")],
)
def test_weights_in_whole_numbers_are_named(
    damaged: Damaged, dtype: torch.dtype, kind: str
) -> None:
    def change(weights: Weights) -> None:
        weights[UP] = weights[UP].to(dtype)

    folder = damaged(change)
    with pytest.raises(InputError, match=rf"lm\.name=.*: {UP} is {kind}.*not quantised"):
        FrozenLM(str(folder), "model.layers.1.mlp").load_()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=rf"{UP} is torch\."):
        FrozenLM(str(folder), "model.layers.1.mlp").load_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floats_are_fine(damaged: Damaged, dtype: torch.dtype) -> None:
    def change(weights: Weights) -> None:
        for name, value in weights.items():
            weights[name] = value.to(dtype)

    FrozenLM(str(damaged(change)), "model.layers.1.mlp").load_()


def test_a_cut_file(damaged: Damaged) -> None:
    folder = damaged(nothing)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"the folder holds no usable model: .*whole copy"):
        FrozenLM(str(folder), "model.layers.1.mlp").load_()


UNFIT = {
    "zeros": (lambda w: w[HOOKED].zero_(), {}, [], "the activations are zero on all"),
    "constant": (one_token, {}, [], r"the activations are the same on all 5\d\d tokens"),
    "overflow": (hot, {}, ["--lm.dtype=float16"], r"first in the output of model\.layers\.2\.mlp.*"
                 "try --lm.dtype bfloat16"),
    "overflowing weight": (lambda w: w[HOOKED].mul_(1e7), {}, ["--lm.dtype=float16"],
                           rf"infinite in float16: {HOOKED}.*--lm.dtype bfloat16"),
    "window": (nothing, {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
               "sliding_window": 160}, [], "sees 160 tokens back .*--data.ctx_len 160 or less"),
    "positions": (nothing, {"max_position_embeddings": 64}, [],
                  r"data\.ctx_len=256: .*takes at most 64 .*--data\.ctx_len 64"),
    "lost": (lambda w: w.pop(HOOKED), {}, [], f"missing from the file: {HOOKED}"),
}  # fmt: skip


@pytest.mark.parametrize("case", rest_slow(UNFIT, ["zeros", "overflow", "window"]))
def test_refused_before_the_first_step_in_one_line(
    damaged: Damaged, tmp_path: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    change, config, args, said = UNFIT[case]
    assert train(damaged(change, **config), tmp_path, *args) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(said, line), line
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
def test_a_window_that_holds_the_rows_is_no_fault(damaged: Damaged, tmp_path: Path) -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = damaged(nothing, sliding_window=160, **config)
    assert train(folder, tmp_path, "--data.ctx_len=160") == 0


@pytest.mark.parametrize("command", ["plan", "fit"])
def test_rows_beyond_the_positions_in_every_command(
    capsys: pytest.CaptureFixture, tmp_path: Path, command: str
) -> None:
    config = ("--config", "configs/kan.yaml", "--config", "configs/embedded.yaml")
    runs = ("--runs_dir", str(tmp_path / "runs"))
    assert main([command, *config, *runs, "--data.ctx_len=1024"]) == 2
    assert "data.ctx_len=1024: 1024 tokens with BOS" in capsys.readouterr().err


def test_positions_that_stretch(damaged: Damaged) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    lm = FrozenLM(str(damaged(nothing, rope_parameters=rope)), "model.layers.1.mlp")
    assert lm.positions == 1024
    lm.check_length(1024, "ctx_len=1024", "")
    with pytest.raises(InputError, match="at most 1024"):
        lm.check_length(1025, "ctx_len=1025", "")


# ----------------------------------------------------------------- later on


def test_sinks_are_dropped_and_nan_is_not() -> None:
    """What `norm <= limit` would drop as if it were a sink."""
    acts = torch.ones(1, 4, 3)
    acts[0, 1], acts[0, 2, 0], acts[0, 3, 0] = 100.0, torch.nan, 1.0
    keep = torch.ones(1, 4, dtype=torch.bool)
    tokens = TokenBatch(keep.long(), keep, torch.zeros_like(keep.long()), torch.zeros(3).long())
    head = BatchTopK(d_model=3, d_sae=4, target_l0=2).eval()
    head.norm_limit.fill_(10.0)
    with pytest.raises(InputError, match=r"text 'some': on 1 of 3 tokens .* NaN or infinite"):
        run_head(Prefix(acts, None), tokens, "some", head)
    acts[0, 2, 0] = torch.inf
    with pytest.raises(InputError, match="on 1 of 3 tokens"):
        run_head(Prefix(acts, None), tokens, "some", head)
    acts[0, 2, 0] = 0.5
    assert run_head(Prefix(acts, None), tokens, "some", head).mask.tolist() == [
        [True, False, True, True]
    ]


def poison_weights(module: SAEModule) -> None:
    for head in module.heads().values():
        next(head.parameters()).data.view(-1)[3] = torch.nan


def poison_activations(module: SAEModule) -> None:
    acts = module.lm.acts
    module.lm.acts = lambda ids: acts(ids).index_fill(1, torch.tensor([5]), torch.nan)  # type: ignore[method-assign]


def at_step(
    monkeypatch: pytest.MonkeyPatch, step: int, poison: Callable[[SAEModule], None]
) -> None:
    """Something goes wrong right after an optimizer step."""
    original = SAEModule.on_train_batch_end

    def spoiled(self: SAEModule, *args: Any) -> None:
        original(self, *args)
        if self.trainer.global_step == step:
            poison(self)

    monkeypatch.setattr(SAEModule, "on_train_batch_end", spoiled)


SAVER = "class_path: RunCheckpoint, init_args: {every_n_steps: 6}"
SAVING = f"--trainer.callbacks+={{{SAVER}}}"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["KANEncoder", "TopK", "Standard"])
def test_a_loss_that_is_no_longer_finite_ends_the_run(
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    head: str,
) -> None:
    at_step(monkeypatch, 14, poison_weights)
    assert fit(SAVING, model__head=head, trainer__logger="false") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"not finite (since step 14 \(between token 896 and 960\)|after step 14)", said
    )
    good = only_run(tmp_path) / "checkpoints" / "step=000000012.ckpt"
    assert f"The last good checkpoint is {good}" in said
    assert "lower --model.optimizer.lr" in said
    for checkpoint in checkpoints(only_run(tmp_path)):
        assert damage(checkpoint) is None
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(v.isfinite().all() for k, v in state.items() if k.endswith(("W_enc", "W_dec")))
    assert checkpoints(only_run(tmp_path))[-1] == good
    assert not (only_run(tmp_path) / "summary.json").exists()
    assert not (only_run(tmp_path) / "head").exists()


def test_weights_lost_in_the_last_step_are_not_saved(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    at_step(monkeypatch, 40, poison_weights)
    assert fit(trainer__logger="false", trainer__val_check_interval="100") == 1
    assert "is not finite after step 40 (2,560 tokens)" in capsys.readouterr().err
    assert not checkpoints(only_run(tmp_path))


def test_activations_that_are_no_longer_finite_end_the_run(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    at_step(monkeypatch, 14, poison_activations)
    assert fit(trainer__logger="false") == 1
    assert "activations of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finite_run_that_diverged_says_so(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(model__optimizer__lr="1000", trainer__logger="false") == 0
    assert "DIVERGED? train/fvu is" in caplog.text
    assert "DIVERGED? val/fvu is" in caplog.text
    summary = (only_run(tmp_path) / "summary.json").read_text()
    json.loads(summary, parse_constant=pytest.fail)


@pytest.mark.slow
def test_an_ordinary_run_says_no_such_thing(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(trainer__logger="false") == 0
    assert "DIVERGED" not in caplog.text


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    values = {"a": torch.nan, "b": {"c": [1.5, -torch.inf, "NaN"]}, "d": (True, None, 3)}
    write_json(tmp_path / "x.json", values)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": None, "b": {"c": [1.5, None, "NaN"]}, "d": [True, None, 3]}
    assert plain(values) == read
