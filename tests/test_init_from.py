"""A run that starts from the weights of another."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from kanllama_lightning.exchange import saelens
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads import BatchTopK, SAEHead, TopK
from kanllama_lightning.training.module import described, to_fit
from tests.conftest import Finished, Fit

QUICK = {"model__tokens": "128", "trainer__logger": "false"}


def test_a_head_takes_over_another() -> None:
    rows = torch.randn(2, 3000, 8, generator=torch.Generator().manual_seed(0))
    first, second = (BatchTopK(d_model=8, d_sae=32, target_l0=4, seed=seed) for seed in (0, 1))
    first.start_(rows[0])
    with torch.no_grad():
        first.encoder.b_enc.add_(0.25)
    first.calibrate_(rows[0])
    second.start_(3 * rows[1] + 1)
    mean, limit = second.x_mean.clone(), second.norm_limit.clone()
    variance = second.x_variance / second.scale**2
    second.take_over_(first)
    x = rows[0, :50]
    first.eval()
    second.eval()
    assert torch.equal(first(x).x_hat, second(x).x_hat)
    assert torch.equal(first.encode(x), second.encode(x))
    # of the text that is trained on now
    assert torch.equal(second.x_mean, mean)
    assert torch.equal(second.norm_limit, limit)
    torch.testing.assert_close(second.x_variance / second.scale**2, variance)


def test_heads_of_another_size_or_kind_do_not_fit() -> None:
    head = BatchTopK(d_model=8, d_sae=32, target_l0=4)
    assert head.fits(BatchTopK(d_model=8, d_sae=32, target_l0=9))
    assert not head.fits(BatchTopK(d_model=8, d_sae=33, target_l0=4))
    assert not head.fits(BatchTopK(d_model=9, d_sae=32, target_l0=4))


def test_what_lets_a_run_start_from_a_head_is_said() -> None:
    def made(**given: int) -> TopK:
        return TopK(**{"d_model": 8, "d_sae": 32, "target_l0": 4} | given)  # type: ignore[arg-type]

    own, through = made(), made(transcoder=True)
    assert to_fit(made(d_model=9), own) == "give a head of this LM and hook point"
    assert to_fit(through, own) == "give --lm.input_point"
    assert to_fit(own, through) == "leave out --lm.input_point"
    assert to_fit(made(transcoder=True, skip=True), through) == "give --model.head.skip true"
    assert to_fit(made(d_sae=33), own) == "give --model.head TopK --model.head.d_sae 33"
    assert described(through) == "TopK, transcoder of 32 latents on 8 coordinates"


@pytest.mark.slow
def test_fine_tuning_begins_where_the_other_run_ended(
    fit: Fit, finished: Finished, tmp_path: Path
) -> None:
    ended = json.loads((finished.folder / "summary.json").read_text())["val/fvu"]
    found = {}
    for name, given in (("anew", None), ("on", str(finished.folder))):
        assert fit(run=str(tmp_path / name), model__init_from=given, **QUICK) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        found[name] = summary["val/fvu"]
        # the control is as untrained as that of a run of its own
        assert summary["baseline/untrained_head/fvu"] > 1.5 * ended
    assert found["on"] < ended + 0.3 * (found["anew"] - ended)
    about = json.loads((tmp_path / "on" / "head" / "head.json").read_text())
    assert about["provenance"]["init_from"] == str(finished.folder)
    assert pd.read_csv(tmp_path / "on" / "losses.csv")["step"].min() == 2
    # a saved head, the budget that it was trained with, and a continued run
    head = finished.folder / "head"
    assert fit(run=str(tmp_path / "head"), model__init_from=str(head), **QUICK) == 0
    assert SAEHead.load(tmp_path / "head" / "head").scale == SAEHead.load(head).scale


@pytest.mark.slow
def test_fine_tuning_begins_with_an_sae_of_another_tool(
    fit: Fit, finished: Finished, tmp_path: Path
) -> None:
    head = SAEHead.load(finished.folder / "head")
    saelens.write(head, Origin(lm="some/llama"), tmp_path / "theirs")
    given = {"model__head": "JumpReLU", "model__init_from": str(tmp_path / "theirs")}
    found = {}
    for name, init in (("on", given["model__init_from"]), ("anew", None)):
        run = tmp_path / name
        assert fit(run=str(run), **QUICK | given | {"model__init_from": init}) == 0
        found[name] = json.loads((run / "summary.json").read_text())["val/fvu"]
    ended = json.loads((finished.folder / "summary.json").read_text())["val/fvu"]
    assert found["on"] < ended + 0.3 * (found["anew"] - ended)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model__init_from": "nowhere"}, ("model.init_from=",)),
        ({"model__init_from": "tests"}, ("model.init_from='tests': ",)),
        (
            {"model__head__d_sae": "48"},
            ("holds a BatchTopK of 32 latents", "--model.head.d_sae 32"),
        ),
    ],
)
def test_what_a_run_cannot_start_from(
    fit: Fit, finished: Finished, capsys: pytest.CaptureFixture, given, said
) -> None:
    assert fit(**{"model__init_from": str(finished.folder)} | QUICK | given) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    for words in said:
        assert words in line
