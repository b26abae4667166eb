"""Transcoders: heads that read one place of the LM and write another."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from kanllama_lightning import heads
from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.exchange import dictionary_learning, saelens, sparsify
from kanllama_lightning.exchange.agreement import agreement, base, made_rows
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.sae import SAE, best_linear_map
from kanllama_lightning.interactive.loaded_sae import load
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import preflight
from kanllama_lightning.reports.saved_head import read_subject
from kanllama_lightning.types import InputError, StepContext, TokenBatch
from tests.conftest import Fit, read_rows, side_by_side_config

D, M, K = 16, 48, 4
KINDS = sorted(
    name for name in heads.__all__ if issubclass(getattr(heads, name), SAE) and name != "SAEHead"
)
ORIGIN = Origin(
    lm="some/llama", hook_point="model.layers.1.mlp", input_point="blocks.1.mlp.hook_in"
)


def pairs(n: int, seed: int = 0) -> Tensor:
    """What is read, and what a small MLP makes of it: neither is centred or of norm 1."""
    weights = torch.Generator().manual_seed(1)
    into, out = (torch.randn(D, 4 * D, generator=weights) / D**0.5 for _ in range(2))
    x = 0.3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.1
    return torch.cat([x, 5 * torch.nn.functional.silu(4 * x @ into) @ out.T + 2], 1)


def made(name: str, skip: bool = False, **more: object) -> SAE:
    head: SAE = getattr(heads, name)(
        d_model=D, d_sae=M, target_l0=K, transcoder=True, skip=skip, **more
    )
    head.start_(pairs(3000))
    return head


def trained(head: SAE, steps: int = 150) -> SAE:
    """The head after some steps."""
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    ctx = StepContext(torch.zeros(0, dtype=torch.int64), 0.5, 0.05)
    for step in range(steps):
        x = pairs(256, seed=step + 10)
        out = head(x)
        loss = torch.stack(list(head.losses(x, out, ctx).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        head.project_grad_()
        optimizer.step()
        head.project_()
        head.observe_(out, ctx)
    head.calibrate_(pairs(4096, seed=5))
    return head.eval()


@torch.no_grad()
def fvu_of(head: SAEHead, n: int = 2000) -> float:
    x = pairs(n, seed=7)
    y = head.target(x)
    return float((head(x).x_hat - y).square().sum() / (y - y.mean(0)).square().sum())


# ---------------------------------------------------------------------------------------- the LM


@pytest.mark.parametrize(
    ("hook_point", "input_point"),
    [
        ("model.layers.1.mlp", "mlp_in"),
        ("model.layers.1.mlp", "resid_mid"),
        ("model.layers.1.mlp", "attn_out"),
        ("model.layers.1.mlp", "blocks.0.mlp.hook_in"),
        ("model.layers.2", "resid_pre"),
        ("model.layers.2", "mlp_in"),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"),
        ("model.layers.2.self_attn", "model.layers.0.self_attn"),
    ],
)
def test_what_is_read_is_what_the_model_computes_there(
    hook_point: str, input_point: str, make_lm: Callable[..., FrozenLM], tokens: TokenBatch
) -> None:
    lm = make_lm(hook_point, input_point=input_point)
    assert lm.input is not None
    seen: list[Tensor] = []
    block = lm.model.model.layers[lm.input.layer]
    module, part = {
        "mlp_in": (block.mlp, "in"),
        "resid_mid": (block.post_attention_layernorm, "in"),
        "attn_out": (block.self_attn, "out"),
        "resid_pre": (block, "in"),
    }[lm.input.kind]
    with torch.no_grad():
        handle = (
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            if part == "in"
            else module.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        )
        lm.model.model(tokens.ids, use_cache=False)
        handle.remove()
    prefix = lm.prefix(tokens.ids)
    assert prefix.inputs is not None
    torch.testing.assert_close(prefix.inputs, seen[0], rtol=1e-5, atol=1e-5)
    # what is written is where it was without a transcoder
    alone = make_lm(hook_point).prefix(tokens.ids)
    assert torch.equal(prefix.acts, alone.acts)
    assert torch.equal(lm.acts(tokens.ids), torch.cat([prefix.inputs, prefix.acts], -1))
    preflight(lm, tokens)


@pytest.mark.parametrize(
    ("hook_point", "input_point", "said"),
    [
        ("model.layers.1.mlp", "mlp_out", "no place that a transcoder reads"),
        ("model.layers.1.mlp", "model.layers.2.self_attn", "reads before it writes"),
        ("blocks.1.hook_resid_pre", "mlp_in", "reads before it writes"),
        ("blocks.1.hook_resid_pre", "resid_pre", "reads before it writes"),
        ("model.layers.1.mlp", "", "no place"),
        ("model.layers.1.mlp", "blocks.x.mlp.hook_in", "no place"),
    ],
)
def test_places_that_cannot_be_read(
    hook_point: str, input_point: str, said: str, make_lm: Callable[..., FrozenLM]
) -> None:
    with pytest.raises(InputError, match=said) as e:
        make_lm(hook_point, input_point=input_point)
    assert repr(input_point) in str(e.value)


# ------------------------------------------------------------------------------------- the heads


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_every_kind_of_head_learns(name: str, skip: bool) -> None:
    head = made(name, skip)
    before = fvu_of(head.eval())
    head = trained(head.train(), 60 if name.startswith("KANReLU") else 150)
    assert fvu_of(head) < min(0.9 * before, 0.8)
    x = pairs(64, seed=3)
    assert torch.equal(head.encode(x), head.encode(x[:, :D]))  # what is written is not looked at
    assert head(x).x_hat.shape == (64, D)
    whole = head.decode(head.encode(x)) + base(head, x)
    torch.testing.assert_close(whole, head(x).x_hat, rtol=1e-4, atol=1e-4)


def test_starts_as_the_sae_of_the_best_linear_guess() -> None:
    """Which beats an encoder that is not tied to what is to be written."""
    head = made("BatchTopK").eval()
    random = made("BatchTopK").eval()
    with torch.no_grad():
        random.encoder.W_enc.copy_(random.drawn().T)
    assert fvu_of(head) < 0.9 < fvu_of(random)
    x = pairs(500)
    read, y = x[:, :D] - x[:, :D].mean(0), x[:, D:] - x[:, D:].mean(0)
    fitted = torch.linalg.lstsq(read, y).solution
    torch.testing.assert_close(best_linear_map(read, y), fitted, rtol=0.05, atol=0.05)


def test_a_skip_leaves_what_is_linear_to_itself() -> None:
    plain, skip = (trained(made("BatchTopK", skip), 300) for skip in (False, True))
    assert fvu_of(skip) < 0.95 * fvu_of(plain)


@pytest.mark.parametrize("name", ["Matryoshka", "Gated"])
def test_losses_of_inner_groups_and_gates_count_the_skip(name: str) -> None:
    """With a skip that writes all there is to write, nothing is left to the latents."""
    head = made(name, skip=True)
    x = pairs(512, seed=3)
    read = head.read(x) - head.input_centre
    y = read @ torch.randn(D, D, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        head.W_skip.copy_(torch.linalg.lstsq(read, y).solution)
        head.b_dec.zero_()
        head.decoder.W_dec.zero_()
    x = torch.cat([x[:, :D], y / head.scale], 1)
    ctx = StepContext(torch.zeros(0, dtype=torch.int64), 0.5, 0.05)
    terms = head.losses(x, head(x), ctx)
    named = {"Matryoshka": ("reconstruction", "nested"), "Gated": ("reconstruction", "gate_aux")}
    for term in named[name]:
        assert float(terms[term].detach()) < 1e-6


@pytest.mark.parametrize("skip", [False, True])
def test_saved_and_loaded(skip: bool, tmp_path: Path) -> None:
    head = trained(made("KANEncoder", skip), 20)
    head.save(tmp_path / "head")
    again = SAEHead.load(tmp_path / "head")
    x = pairs(100, seed=3)
    assert again.transcoder
    assert torch.equal(again(x).x_hat, head(x).x_hat)


@pytest.mark.parametrize("name", ["Standard", "TopK", "BatchTopK", "JumpReLU", "FrozenEncoder"])
@pytest.mark.parametrize("skip", [False, True])
def test_folded(name: str, skip: bool) -> None:
    head = trained(made(name, skip), 20)
    folded = head.folded()
    x = pairs(500, seed=3)
    torch.testing.assert_close(folded(x).x_hat, head(x).x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.encode(x) * head.scale, head.encode(x), rtol=1e-4, atol=1e-4)
    assert float(folded.scale) == float(folded.input_scale) == 1.0


def test_the_control_is_the_best_linear_map() -> None:
    """What a skip reaches alone; a trained skip transcoder beats it."""
    control = heads.LinearMap(D)
    x = pairs(4000)
    control.start_(x)
    read, y = x[:, :D] - x[:, :D].mean(0), x[:, D:] - x[:, D:].mean(0)
    fitted = read @ torch.linalg.lstsq(read, y).solution
    best = float((fitted - y).square().sum() / y.square().sum())
    assert fvu_of(control, 4000) == pytest.approx(best, rel=0.05)
    assert fvu_of(trained(made("BatchTopK", skip=True), 300)) < 0.9 * best
    assert int(control(x).codes.l0().sum()) == 0
    with pytest.raises(InputError, match="LinearMap is a control"):
        heads.LinearMap(D, 2)


def test_a_skip_is_of_a_transcoder() -> None:
    with pytest.raises(InputError, match="head.skip=true: of a transcoder only"):
        heads.TopK(d_model=D, d_sae=M, target_l0=K, skip=True)


# --------------------------------------------------------------------------------- other projects


@pytest.mark.parametrize(
    ("name", "to", "became"),
    [
        ("Standard", saelens, "{}transcoder"),
        ("JumpReLU", saelens, "jumprelu_{}transcoder"),
        ("BatchTopK", saelens, "jumprelu_{}transcoder"),
        ("Matryoshka", saelens, "jumprelu_{}transcoder"),
        ("FrozenEncoder", saelens, "jumprelu_{}transcoder"),
        ("TopK", sparsify, "SparseCoder"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_comes_back_from_other_projects(
    name: str, to: object, became: str, skip: bool, tmp_path: Path
) -> None:
    head = trained(made(name, skip), 30)
    out = tmp_path / "out"
    assert to.write(head, ORIGIN, out) == became.format("skip_" if skip else "")  # type: ignore[attr-defined]
    again, origin = to.read(out)  # type: ignore[attr-defined]
    assert again.transcoder
    assert origin.input_point == "blocks.1.mlp.hook_in"
    assert origin.site == ORIGIN.site
    x = made_rows(head, 1500)
    found = agreement(head, again.encode, again.decode, x, lambda rows: base(again, rows))
    assert found.holds, found
    assert found.l0 > 0.5
    # the control: without what the skip adds it is another map
    if skip:
        assert not agreement(head, again.encode, again.decode, x).holds


def test_sparsify_s_own_read_what_their_module_gets(tmp_path: Path) -> None:
    """They are called by the module that they stand for, and say no more."""
    for name, place in (
        ("layers.1.mlp", "blocks.1.mlp.hook_in"),
        ("layers.1", "blocks.1.hook_resid_pre"),
        ("layers.1.self_attn", None),  # what it gets is no place that one reads here
    ):
        sparsify.write(trained(made("TopK"), 1), ORIGIN, tmp_path / name)
        (tmp_path / name / "origin.json").unlink()
        _, origin = sparsify.read(tmp_path / name)
        assert (origin.hook_point, origin.input_point) == (f"model.{name}", place)


def test_what_no_format_holds_is_refused(tmp_path: Path) -> None:
    for name, to, said in (
        ("TopK", dictionary_learning, "transcoder"),
        ("BatchTopK", sparsify, "sparsify keeps the k largest"),
    ):
        with pytest.raises(InputError, match=said):
            to.write(trained(made(name), 1), ORIGIN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["KANEncoder", "Gated", "TopK"])
@pytest.mark.parametrize("skip", [False, True])
def test_what_saelens_has_no_transcoder_for_is_written_whole(
    name: str, skip: bool, tmp_path: Path
) -> None:
    """For the plug-in; `benchmarks/exchange_parity.py` loads such folders in SAELens itself."""
    head = trained(made(name, skip=skip), 5).eval()
    assert saelens.write(head, ORIGIN, tmp_path / "out") == "kanllama"
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.1.mlp.hook_in"
    assert metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    again, origin = saelens.read(tmp_path / "out")
    x = pairs(500, seed=4)
    assert torch.equal(again.eval()(x).x_hat, head(x).x_hat)
    assert origin.input_point == ORIGIN.input_point


def test_a_foreign_one_of_two_widths_is_refused(tmp_path: Path) -> None:
    saelens.write(trained(made("JumpReLU"), 5), ORIGIN, tmp_path / "out")
    path = tmp_path / "out" / "cfg.json"
    config = json.loads(path.read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    path.write_text(json.dumps(config | {"d_out": 32}))
    with pytest.raises(InputError, match="d_out=32, d_in=16"):
        saelens.read(tmp_path / "out")


# ---------------------------------------------------------------------------------------- a run


def test_a_run_its_record_and_its_export(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(lm__input_point="mlp_in", model__head__skip="true", run=str(run)) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["input_point"] == "blocks.1.mlp.hook_in"
    assert summary["val/fvu"] < summary["baseline/untrained_head/fvu"]
    assert 0 < summary["baseline/linear_map/fvu"] < 1
    assert "baseline/PCA/fvu" not in summary
    assert read_subject(run).head.transcoder
    assert evaluate(["report", str(run), "--documents", "15", "--reports", "losses", "latents",
                     "reconstruction", "sparsity", "dashboard"]) == 0  # fmt: skip
    eval_ = json.loads((run / "eval" / "summary.json").read_text())
    assert eval_["input_point"] == "blocks.1.mlp.hook_in"
    document = pd.read_csv(run / "eval" / "losses.csv")
    assert (document["ce_recon"] > 0).all()
    # the head alone says where it reads
    assert (
        evaluate(
            [
                "report",
                str(run / "head"),
                "--ctx_len",
                "32",
                "--text",
                str(run.parent / "none.jsonl"),
            ]
        )
        == 2
    )
    assert "none.jsonl" in capsys.readouterr().err
    out = tmp_path / "out"
    assert evaluate(["export", str(run), "--to", "saelens", "--out", str(out)]) == 0
    assert "jumprelu_skip_transcoder" in capsys.readouterr().out
    sae = load(run)
    assert sae.encode(torch.zeros(3, 16)).shape == (3, 32)
    assert sae.steer({1: 2.0}).generate("w1 w2", 2).startswith("w1 w2")


def test_one_that_reads_what_it_writes_is_compared_with_it(fit: Fit, tmp_path: Path) -> None:
    """Both reconstruct the MLP's output, so that their figures mean the same."""
    assert fit(lm__input_point="mlp_in", run=str(tmp_path / "transcoder")) == 0
    assert fit(run=str(tmp_path / "sae")) == 0
    runs = [str(tmp_path / name) for name in ("transcoder", "sae")]
    out = tmp_path / "compared"
    assert evaluate(["compare", *runs, "--documents", "15", "--out", str(out)]) == 0
    rows = read_rows(out / "comparison.csv")
    assert len(rows) == 2


def test_heads_side_by_side(fit: Fit, tmp_path: Path) -> None:
    config = side_by_side_config(
        tmp_path,
        {
            "linear": {"class_path": "BatchTopK", "init_args": {"skip": True}},
            "kan": {"class_path": "KANEncoder"},
        },
    )
    given = {"model__head": None, "model__head__d_sae": None, "model__head__target_l0": None}
    run = tmp_path / "run"
    assert fit(config, lm__input_point="mlp_in", run=str(run), **given) == 0
    for name in ("linear", "kan"):
        assert SAEHead.load(run / name / "head").transcoder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lm__input_point": "mlp_inn"}, "lm.input_point='mlp_inn'"),
        ({"model__head__skip": "true"}, "head.skip=true: of a transcoder only"),
        ({"model__head__transcoder": "true"}, "follows from lm.input_point"),
        ({"lm__input_point": "mlp_in", "model__head": "DenseOnlyKAN"}, "cannot be a transcoder"),
        (
            {"model__head": "PCA", "model__head__d_sae": "4", "model__head__target_l0": None},
            "model.head=PCA: a control that",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    given: dict[str, str], said: str, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(**given) == 2
    assert said in capsys.readouterr().err
