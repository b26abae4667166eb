"""The command line as people use it: a run, its outputs, stopping and going on, and mistakes."""

import json
import math
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import GPT2Config

from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.heads import BatchTopK, SAEHead
from kanllama_lightning.heads.sae import flat_name
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.number_format import Format
from kanllama_lightning.measures.metrics import ReconstructionMetric, SparsityMetric
from kanllama_lightning.runs.checkpoints import buffer_file, seal
from kanllama_lightning.runs.seals import written
from tests.conftest import Finished, Fit, only_run, terminate_at, word_tokenizer
from tests.wandb_file import history
from train import main

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_leaves_everything_behind(finished: Finished) -> None:
    run_folder = finished.folder
    summary = json.loads((run_folder / "summary.json").read_text())
    keys = ("l0", "delta_ce", "delta_ce_low", "delta_ce_high", "fvu", "dead_frac", "cosine", "bias")
    for key in (*keys, "kl_recon"):
        assert math.isfinite(summary[f"val/{key}"])
        assert summary[f"val/{key}"] == summary[f"val/heldout/{key}"]
    assert summary["tokens"] == 2560
    assert summary["finished"] is True
    assert summary["tokens_per_second"] > 0
    assert summary["val/delta_ce_low"] < summary["val/delta_ce"] < summary["val/delta_ce_high"]
    assert summary["val/ce_uniform"] == pytest.approx(math.log(64))
    losses = {run: summary[f"val/ce_{run}"] for run in ("clean", "zero", "mean")}
    own = {k.removeprefix("val/"): v for k, v in summary.items() if k.count("/") == 1}
    for control in ("", "PCA", "untrained_head"):
        if control:
            own = {k.rsplit("/")[-1]: v for k, v in summary.items() if f"baseline/{control}/" in k}
        assert own["delta_ce_low"] < own["delta_ce"] < own["delta_ce_high"]
        # the random model does not get worse without its activations: shares of that mean nothing
        assert own["delta_ce_share"] is None
        assert own["ce_score"] is None
    assert all(losses[run] - losses["clean"] < 0.01 for run in ("zero", "mean"))

    l0 = pd.read_csv(run_folder / "l0.csv")
    losses = pd.read_csv(run_folder / "losses.csv")
    assert list(l0["step"].unique()) == [10, 20, 30, 40]
    assert not l0.duplicated(["step", "set", "batch"]).any()
    last = l0[l0["step"] == 40]
    pooled = (last["l0"] * last["n_tokens"]).sum() / last["n_tokens"].sum()
    assert pooled == pytest.approx(summary["val/l0"], rel=1e-6)
    last = losses[losses["step"] == 40]
    pooled = (last["ce_recon"] * last["n_targets"]).sum() / last["n_targets"].sum()
    assert pooled == pytest.approx(summary["val/ce_recon"], rel=1e-6)

    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert config["model"]["head"]["init_args"]["target_l0"] == 4
    out = finished.printed
    for row in ("BatchTopK on", "PCA on", "untrained"):  # cells are broken between words
        assert row in out
    for said in ("delta CE (95 %", "of a uniform guess", "not meaningful: FVU is above 1"):
        assert said in out
    assert "CE score" not in out


def test_wandb_run_can_be_read_back(run_folder: Path) -> None:
    (file,) = run_folder.glob("wandb/offline-run-*/*.wandb")
    rows, config = history(file)
    train = [r for r in rows if "a_main/loss" in r]
    val = [r for r in rows if "a_main/l0" in r]
    assert len(train) >= 5
    assert len(val) >= 3
    assert all("tokens" in r for r in train + val)
    assert [r["tokens"] for r in train] == sorted(r["tokens"] for r in train)
    assert config["cli"]["model"]["tokens"] == 2560
    keys = {key for row in rows for key in row}
    assert not [key for key in keys if key.startswith(("val/", "train/", "epoch"))]
    assert not [key for key in keys if "heldout" in key], "the first set's figures stand once"
    assert {"a_main/tokens_per_second", "g_controls/PCA/fvu", "h_speed/lm"} <= keys
    assert all(row["a_main/tokens_per_second"] > 0 for row in train[1:])


def test_saved_head_reproduces_the_reported_figures(
    run_folder: Path, tiny_lm_dir: Path, text_file: Path
) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    head = SAEHead.load(run_folder / "head")
    assert isinstance(head, BatchTopK)
    lm = FrozenLM(str(tiny_lm_dir), "model.layers.1.mlp", untrained=True).load_()
    data = TokenData(lm.tokenizer, str(text_file), ctx_len=32, lm_batch_seqs=4, val_tokens=512)
    data.setup("validate")
    sparsity, reconstruction = SparsityMetric(head.d_sae), ReconstructionMetric(head.d_model)
    for batch in data.val_dataloader()[0]:
        acts = lm.acts(batch.ids)
        x = acts[batch.keep & (acts.norm(dim=-1) <= head.norm_limit)]
        out = head(x)
        sparsity.update(out.codes)
        reconstruction.update(x, out.x_hat)
    assert sparsity.compute()["l0"] == pytest.approx(summary["val/l0"], rel=1e-5)
    assert reconstruction.compute()["fvu"] == pytest.approx(summary["val/fvu"], rel=1e-5)


def test_checkpoints_hold_no_lm_and_no_pickles(run_folder: Path) -> None:
    checkpoint = sorted((run_folder / "checkpoints").glob("*.ckpt"))[-1]
    state = torch.load(checkpoint, weights_only=True)
    assert all(k.startswith("trainees.0.") or "." not in k for k in state["state_dict"])
    head = sum(v.numel() for k, v in state["state_dict"].items() if ".head." in k)
    assert checkpoint.stat().st_size < 3 * 4 * head + 200_000
    assert not list(run_folder.rglob("*.tmp"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SAEHead.load(folder / "head").state_dict()


def test_stopped_and_continued_is_the_same_run(
    fit: Fit, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle, then `--ckpt_path last`: same weights bit for bit, whole CSVs."""
    undisturbed = finished.folder
    terminate_at(monkeypatch, 23, 30)
    assert fit() == 128 + signal.SIGTERM
    assert not (only_run(tmp_path) / "summary.json").exists()
    # stops again, this time right after a validation
    assert fit("--ckpt_path=last") == 128 + signal.SIGTERM
    assert fit("--ckpt_path=last") == 0
    stopped = only_run(tmp_path)
    for name, value in weights(undisturbed).items():
        assert torch.equal(value, weights(stopped)[name]), name
    for table in ("l0.csv", "losses.csv"):
        assert (undisturbed / table).read_text() == (stopped / table).read_text()
    runs = list(stopped.glob("wandb/offline-run-*"))
    assert len({r.name.split("-")[3] for r in runs}) == 1, "the same W&B id"
    assert len(runs) == 3


@pytest.mark.slow
def test_killed_run_goes_on_from_its_last_checkpoint(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after a validation that the checkpoint does not know of: no repeat in the CSVs."""
    callbacks = str(tmp_path / "callbacks.yaml")
    often = {"class_path": "kanllama_lightning.callbacks.checkpoint.RunCheckpoint"}
    often["init_args"] = {"every_n_steps": 15}
    Path(callbacks).write_text(yaml.safe_dump({"trainer": {"callbacks": [often]}}))
    assert fit(f"--config={callbacks}", runs_dir=str(tmp_path / "undisturbed")) == 0
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()

    from kanllama_lightning.training.module import SAEModule

    original = SAEModule.on_before_optimizer_step
    crashes = [28]

    def crash(self: SAEModule, optimizer: torch.optim.Optimizer) -> None:
        if crashes and self.trainer.global_step == crashes[0] - 1:
            crashes.pop()
            raise MemoryError("as if the machine had gone")
        original(self, optimizer)

    monkeypatch.setattr(SAEModule, "on_before_optimizer_step", crash)
    with pytest.raises(MemoryError):
        fit(f"--config={callbacks}")
    assert pd.read_csv(only_run(tmp_path) / "l0.csv")["step"].max() == 20
    assert fit(f"--config={callbacks}", "--ckpt_path=last") == 0
    for name, value in weights(undisturbed).items():
        assert torch.equal(value, weights(only_run(tmp_path))[name]), name
    assert (undisturbed / "l0.csv").read_text() == (only_run(tmp_path) / "l0.csv").read_text()


def test_finished_run_can_be_extended(run_folder: Path, fit: Fit) -> None:
    assert fit(f"--ckpt_path={run_folder}", model__tokens="3200") == 0
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["tokens"] == 3200
    steps = pd.read_csv(run_folder / "l0.csv")["step"].unique()
    assert list(steps) == [10, 20, 30, 40, 50]


@pytest.mark.slow
def test_run_cut_short_is_unfinished(fit: Fit, tmp_path: Path) -> None:
    assert fit(trainer__max_steps="7") == 0
    assert json.loads((only_run(tmp_path) / "summary.json").read_text())["finished"] is False
    assert fit("--ckpt_path=last") == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 40


def test_validate_leaves_the_run_alone(run_folder: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in run_folder.glob("*.*")}
    config = run_folder / "config.yaml"
    given = [f"--config={config}", f"--ckpt_path={run_folder}", f"--runs_dir={tmp_path / 'runs'}"]
    assert main(["validate", *given]) == 0
    assert {p: p.read_bytes() for p in run_folder.glob("*.*")} == before
    (folder,) = (tmp_path / "runs").glob("*validate")
    old, new = (json.loads((f / "summary.json").read_text()) for f in (run_folder, folder))
    assert new["tokens"] == old["tokens"]
    of_the_session = ("finished", "seconds_in_checkpoints")
    assert {k: v for k, v in new.items() if k not in of_the_session} == {
        k: v for k, v in old.items() if k not in of_the_session
    }


def test_validate_with_another_head_is_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--config={run_folder / 'config.yaml'}", f"--ckpt_path={run_folder}"]
    given += [f"--runs_dir={tmp_path / 'runs'}", "--model.head.d_sae=64"]
    capsys.readouterr()
    assert main(["validate", *given]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "ckpt_path: the checkpoint is of another head" in err


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("head", "is a part of the run folder"),
        ("checkpoints", "is a part of the run folder"),
        ("head/head.safetensors", "is a part of the run folder"),
    ],
)
def test_a_part_of_a_run_is_no_checkpoint(
    part: str, said: str, fit: Fit, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(ckpt_path=str(run_folder / part)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert f"give --ckpt_path {run_folder}" in err


def test_a_run_inside_a_run_is_refused(
    fit: Fit, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(run=str(run_folder / "checkpoints" / "new")) == 2
    assert "lies inside the run folder" in capsys.readouterr().err
    assert fit(data__cache=str(run_folder), run=str(run_folder.parent / "other")) == 2
    assert "is the folder of a run; give another" in capsys.readouterr().err


def test_files_of_something_else_are_left_alone(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    for name in ("config.yaml", "wandb/log.txt", "checkpoints/epoch=3.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine: 1\n")
    before = sorted(folder.rglob("*"))
    assert fit(run=str(folder)) == 2
    assert "what it holds is not of a run (checkpoints, config.yaml, wandb)" in (
        capsys.readouterr().err
    )
    assert sorted(folder.rglob("*")) == before
    assert (folder / "config.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize("option", ["run", "runs_dir", "ckpt_path"])
def test_an_empty_path_is_refused(
    option: str, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(**{option: ""}) == 2
    assert f"{option}='': names nothing" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_one_line(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(run=str(tmp_path / ("a" * 300))) == 2
    err = capsys.readouterr().err
    assert "the name is too long" in err
    assert "make room" not in err


@pytest.mark.slow
def test_same_seed_same_run(fit: Fit, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert fit(run=str(tmp_path / name), model__tokens="640") == 0
    assert fit("--seed_everything=1", run=str(tmp_path / "c"), model__tokens="640") == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["decoder.W_dec"], c["decoder.W_dec"])


def figures(folder: Path) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {
        k: v for k, v in summary.items() if not k.startswith(("seconds", "tokens_per", "time/"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
def test_ended_in_the_final_validation_and_continued_is_the_same_run(
    fit: Fit, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered: bool
) -> None:
    """No training hook runs then; a head without a buffer is calibrated all the same."""
    given = {} if buffered else {"model.buffer.capacity_tokens": "0"}
    calm, ended = tmp_path / "calm", tmp_path / "ended"
    if buffered:
        calm = finished.folder
    else:
        assert fit(run=str(calm), trainer__logger="false", **given) == 0

    from kanllama_lightning.cli.train_command import KanllamaCLI

    def end(_: KanllamaCLI) -> None:
        raise MemoryError("as if the machine had gone")

    with monkeypatch.context() as m:
        m.setattr(KanllamaCLI, "after_fit", end)
        with pytest.raises(MemoryError):
            fit(run=str(ended), trainer__logger="false", **given)
    assert not (ended / "summary.json").exists()
    assert fit(f"--ckpt_path={ended}", trainer__logger="false", **given) == 0
    assert all(torch.equal(v, weights(ended)[k]) for k, v in weights(calm).items())
    assert figures(ended) == figures(calm)
    assert any(key.startswith("time/") for key in json.loads((ended / "summary.json").read_text()))


def test_a_finished_run_says_so_and_is_left_alone(
    run_folder: Path, fit: Fit, capsys: pytest.CaptureFixture
) -> None:
    def stamps() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()}

    before = stamps()
    capsys.readouterr()
    assert fit(f"--ckpt_path={run_folder}") == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert stamps() == before
    refused(capsys, fit(f"--ckpt_path={run_folder}", model__tokens="640"), "ask for more")
    refused(
        capsys,
        fit(f"--ckpt_path={run_folder}", run=str(run_folder.parent / "other")),
        "--run",
        str(run_folder),
        "a run goes on in its own folder",
    )
    assert stamps() == before


@pytest.mark.slow
def test_a_config_of_before_is_a_recipe(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs again, the same; `ckpt_path` in it is said to be left out; `--run` counts."""
    old = tmp_path / "old.yaml"
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert not config.keys() & {"run", "runs_dir", "ckpt_path", "weights_only"}
    said = {"run": str(run_folder), "ckpt_path": str(run_folder)}
    old.write_text(yaml.safe_dump(config | said))
    before = (run_folder / "summary.json").read_bytes()
    assert main(["fit", f"--config={old}", f"--run={tmp_path / 'new'}"]) == 0
    assert (run_folder / "summary.json").read_bytes() == before
    assert figures(tmp_path / "new") == figures(run_folder)
    again = weights(tmp_path / "new")
    assert all(torch.equal(v, again[k]) for k, v in weights(run_folder).items())
    assert any(r.message.startswith("ckpt_path in a config") for r in caplog.records)


@pytest.mark.slow
def test_what_makes_a_run_a_run_is_always_there(fit: Fit, tmp_path: Path) -> None:
    assert fit(trainer__callbacks="[]", model__tokens="640", trainer__logger="false") == 0
    folder = only_run(tmp_path)
    assert (folder / "head" / "head.json").is_file()
    assert "baseline/PCA/fvu" in figures(folder)
    assert not (folder / "lens.csv").exists(), "an extra"


@pytest.mark.slow
def test_the_run_folder_in_the_environment(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KANLLAMA_RUN_FOLDER", str(tmp_path / "told"))
    assert fit(model__tokens="64", trainer__logger="false") == 0
    assert (tmp_path / "told" / "summary.json").is_file()
    capsys.readouterr()
    refused(capsys, fit(run=str(tmp_path / "other")), "KANLLAMA_RUN_FOLDER", "name one folder")


@pytest.mark.slow
def test_left_by_a_kill_before_the_first_checkpoint(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """Named and cleared by the same command; `last` says to leave it out."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/step=000000010.ckpt.tmp", "wandb_id", "l0.csv"):
        (folder / name).touch()
    refused(capsys, fit("--ckpt_path=last", run=str(folder)), "leave --ckpt_path out")
    assert fit(run=str(folder), model__tokens="64", trainer__logger="false") == 0
    assert any("cleared away" in r.message for r in caplog.records)
    assert (folder / "summary.json").is_file()


@pytest.mark.slow
def test_a_folder_deleted_under_a_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from kanllama_lightning.training.module import SAEModule

    original = SAEModule.on_train_batch_end

    def delete(self: SAEModule, *args: object) -> None:
        original(self, *args)
        if self.trainer.global_step == 5:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(SAEModule, "on_train_batch_end", delete)
    code = fit(run=str(tmp_path / "run"), model__tokens="640", trainer__logger="false")
    refused(capsys, code, "deleted, moved or replaced", "--ckpt_path NEW_FOLDER")
    assert not (tmp_path / "run").exists(), "nothing is written into its place"


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision_keeps_fp32_weights(fit: Fit, tmp_path: Path, precision: str) -> None:
    assert fit(trainer__precision=precision, model__tokens="640") == 0
    head = weights(only_run(tmp_path))
    assert all(v.dtype == torch.float32 for v in head.values())
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["val/fvu"] < 1


def test_base_config_is_read_from_anywhere(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(model__tokens="64", trainer__logger="false") == 0
    assert (only_run(tmp_path) / "summary.json").exists()


@pytest.mark.slow
def test_two_validation_sets(fit: Fit, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    texts = [json.loads(line)["text"].split() for line in text_file.read_text().splitlines()]
    other.write_text("".join(json.dumps({"text": " ".join(t[::-1])}) + "\n" for t in texts))
    assert fit(f"--data.val=[{other}]", model__tokens="640") == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["val/l0"] == summary["val/heldout/l0"]
    assert summary["val/other/l0"] > 0
    assert set(pd.read_csv(only_run(tmp_path) / "losses.csv")["set"]) == {"heldout", "other"}


# ------------------------------------------------------------------ mistakes


def refused(capsys: pytest.CaptureFixture, code: int, *words: str) -> str:
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert err.count("error:") == 1, err
    return err


def test_unknown_key(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit("--model.tokns=5"), "model.tokns")


def test_abbreviation(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit("--trainer.max_step=5"), "trainer.max_step")


def test_unknown_key_in_file(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("model:\n  tokns: 5\n")
    refused(capsys, fit(f"--config={file}"), "tokns")


def test_unknown_head_argument(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit("--model.head.gird=5"), "gird")


def test_misspelt_head(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit(model__head="KANEncodr"), "KANEncodr", "Did you mean KANEncoder", "TopK")


def test_misspelt_hook(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    code = fit(lm__hook_point="model.layers.1.mpl")
    refused(capsys, code, "model.layers.1.mpl", "Did you mean model.layers.1.mlp", "hook_resid_mid")


def test_k_larger_than_dictionary(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(
        capsys,
        fit(model__head__target_l0="33", **{"model.head.target_l0": "33"}),
        "target_l0=33",
        "d_sae=32",
    )


def test_batch_larger_than_the_buffer(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    code = fit(model__sae_batch_tokens="1024")
    refused(capsys, code, "sae_batch_tokens=1024", "capacity_tokens=512")


@pytest.mark.parametrize("name", ["tokens", "sae_batch_tokens", "start_tokens"])
def test_lengths_below_one(fit: Fit, name: str, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit(**{f"model.{name}": "0"}), f"model.{name}=0", "at least 1")


def test_model_of_another_kind(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64).save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    refused(capsys, fit(lm__name=str(tmp_path / "gpt2")), "gpt2", "Llama kind")


def test_linked_target(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit("--model.head.d_model=8"), "model.head.d_model", "lm.name")


def test_ids_of_another_tokenizer(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(json.dumps({"text": [5, 900, 7] * 30}) + "\n" for _ in range(50)))
    refused(capsys, fit(data__train=str(file)), "tokenizer")


def test_empty_dataset(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(capsys, fit(data__train=str(tmp_path / "empty.jsonl")), "empty.jsonl")
    assert not list((tmp_path / "runs").iterdir()), "a mistake leaves no empty run behind"


def test_missing_column(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "story.jsonl"
    file.write_text('{"story": "w1 w2"}\n' * 50)
    refused(capsys, fit(data__train=str(file)), "'text'", "story")


def test_what_a_checkpoint_of_other_tensors_is_told(
    fit: Fit, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One from before heads had parts is told apart from one of another size."""
    given = {"model__tokens": "64", "trainer__logger": "false"}
    assert fit(model__head="DenseOnlyKAN", run=str(tmp_path / "dense"), **given) == 0
    again = ["validate", f"--config={tmp_path / 'dense' / 'config.yaml'}"]
    again += [f"--runs_dir={tmp_path / 'others'}"]
    checkpoint = sorted((tmp_path / "dense" / "checkpoints").glob("*.ckpt"))[-1]
    code = main([*again, f"--ckpt_path={checkpoint}", "--model.head.d_sae=48"])
    refused(capsys, code, "of another head", "asked for")
    again[1] = f"--config={run_folder / 'config.yaml'}"
    checkpoint = sorted((run_folder / "checkpoints").glob("*.ckpt"))[-1]
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"] = {flat_name(k): v for k, v in saved["state_dict"].items()}
    torch.save(saved, checkpoint)
    seal(checkpoint, [written(checkpoint), written(buffer_file(checkpoint, 0))])
    code = main([*again, f"--ckpt_path={checkpoint}"])
    refused(capsys, code, "before heads had parts", "start a new run")


def test_missing_file(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit(data__train="./nowhere.jsonl"), "nowhere.jsonl")


def test_run_folder_below_a_file(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    refused(capsys, fit(run=str(tmp_path / "file" / "run")), "file/run", "--run")


def test_checkpoint_of_another_head(
    fit: Fit, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    checkpoint = sorted((run_folder / "checkpoints").glob("*.ckpt"))[-1]
    code = fit(f"--ckpt_path={checkpoint}", model__head="KANEncoder")
    refused(capsys, code, "another configuration", "BatchTopK", "KANEncoder")


def test_nothing_to_continue(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit("--ckpt_path=last"), "nothing to go on with")


def test_last_never_takes_another_configuration(
    fit: Fit, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (run_folder / "summary.json").unlink()
    capsys.readouterr()
    refused(
        capsys,
        fit("--ckpt_path=last", **{"model.head.target_l0": "5"}),
        "nothing",
        "head.init_args.target_l0",
    )


def test_run_folder_in_use(fit: Fit, run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    refused(capsys, fit(run=str(run_folder)), "holds a run already", "--ckpt_path")


def test_fp16_is_refused(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit(trainer__precision="16-mixed"), "16-mixed", "bf16-mixed")


def test_trained_by_declaration_only(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    refused(capsys, fit(lm__untrained="false"), "uniform guess", "--lm.untrained")


def test_unreachable_model(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    code = fit(lm__name="meta-llama/Llama-3.2-1B")
    refused(
        capsys, code, "huggingface.co/meta-llama/Llama-3.2-1B", "login", "embedded.yaml", "FOLDER"
    )


@pytest.mark.slow
def test_truncated_lines_are_skipped_and_counted(
    fit: Fit, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "torn.jsonl"
    file.write_text(text_file.read_text() + '{"text": "w1 w2')
    assert fit(data__train=str(file), model__tokens="64") == 0
    assert any("1 " in r.message and "malformed" in r.message for r in caplog.records)


def test_too_many_truncated_lines(
    fit: Fit, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "torn.jsonl"
    file.write_text(text_file.read_text() + '{"text": "w1 w2\n' * 20)
    refused(capsys, fit(data__train=str(file)), "torn.jsonl", "%")


@pytest.mark.slow
def test_a_number_format_that_is_chosen_stands_in_the_config(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Format("bfloat16", "as a test says")
    monkeypatch.setattr("kanllama_lightning.cli.fit.fastest", lambda: chosen)
    given = {"lm__dtype": "auto", "model__tokens": "640", "trainer__logger": "false"}
    folder = tmp_path / "run"
    assert fit(run=str(folder), **given) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["lm"]["dtype"] == "bfloat16"
    about = json.loads((folder / "head" / "head.json").read_text())
    assert about["provenance"]["lm_dtype"] == "bfloat16"
