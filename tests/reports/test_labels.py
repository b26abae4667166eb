"""One label for a latent: explanation, else fact, else the tokens it fires on; everywhere."""

import pandas as pd
import pytest

from kanllama_lightning.cli.evaluate_command import main
from kanllama_lightning.dashboard.contents import Concept, Scores
from kanllama_lightning.dashboard.unpack import read_dashboard
from kanllama_lightning.reports.labels import Known, read_labels

SAID = Scores("names of boys", "", 5, 0.9, "judge")


def concept(f1):
    return Concept("now:place:attic", f1, 0.6, 0.6)


@pytest.mark.parametrize(
    ("concepts", "scores", "label"),
    [
        ({3: [concept(0.9)]}, {3: SAID}, "names of boys"),
        ({3: [concept(0.5), concept(0.2)]}, {4: SAID}, "now:place:attic"),
        ({3: [concept(0.49)]}, {}, '" her" ","'),
        ({3: [concept(float("nan"))]}, {}, '" her" ","'),
        ({}, {}, '" her" ","'),
    ],
    ids=str,
)
def test_what_a_latent_is_called_by(concepts, scores, label):
    assert Known(concepts, scores).label(3, [" her", ","]) == label


def test_a_latent_that_never_fired_has_no_label():
    assert Known({}, {}).label(0, []) == ""


def test_table_dashboard_and_try_call_a_latent_the_same(run, capsys):
    """A run of the tiny model, with a fact and an explanation written beside it."""
    (run / "eval").mkdir()
    facts = {"subject": "head", "fact": "now:place:attic", "precision": 0.6, "recall": 0.6}
    rows = [facts | {"latent": j, "f1": f1} for j, f1 in ((0, 0.9), (1, 0.5), (2, 0.4))]
    pd.DataFrame(rows).to_csv(run / "eval/concepts.csv", index=False)
    said = {"subject": "head", "latent": 0, "explanation": "names of boys", "category": ""}
    table = pd.DataFrame([said | {"score": 5, "detection": 0.9}])
    table.to_csv(run / "eval/interpretability.csv", index=False)
    asked = ["report", str(run), "--reports", "latents", "dashboard", "--documents", "12"]
    assert main(asked) == 0
    labels = read_labels(run / "eval/latents.csv")
    assert labels[0] == "names of boys"
    assert labels[1] == "now:place:attic"
    assert "attic" not in labels.get(2, "")
    page = read_dashboard(run / "eval/dashboard.html")
    shown = enumerate(page["columns"]["label"]["values"])
    assert {j: label for j, label in shown if label} == labels
    capsys.readouterr()
    args = ["--n_new", "0", "--steer", "0=1", "1=1"]
    assert main(["try", str(run), "--text", "w1 w2 w3", *args]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "latent 0 (names of boys) to 1" in out
    assert "latent 1 (now:place:attic) to 1" in out
