"""Heads on the hub: published, listed, and read from there; a server of this machine answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.exchange.formats import read_foreign
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.interactive.loaded_sae import load
from kanllama_lightning.reports.saved_head import read_subject
from kanllama_lightning.runs.from_hub import parsed
from kanllama_lightning.types import InputError
from tests.hub_server import TOKEN, Hub

# of the hub's client and its HTTP library, between each other
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and somebody who is logged in."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    at = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def publish(run: Path, *more: str) -> int:
    return evaluate(["publish", str(run), "me/my-sae", *more])


@pytest.mark.parametrize("record", [False, True])
def test_what_is_published_is_the_head_its_record_and_a_card(
    record: bool, run_folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if record:
        assert evaluate(["report", str(run_folder), "--documents", "15",
                         "--reports", "losses", "latents", "sparsity"]) == 0  # fmt: skip
    config = run_folder / "config.yaml"
    config.write_text(config.read_text() + "\nnote: http://me:a-password@host/x\n")
    capsys.readouterr()
    assert publish(run_folder, "--dry_run", "true") == 0
    said = capsys.readouterr().out
    assert "head.safetensors" in said
    assert "Nothing was sent" in said
    assert not hub.requests
    assert publish(run_folder, "--license", "mit") == 0
    assert "Published: " in capsys.readouterr().out
    files = hub.repositories["me/my-sae"]
    wanted = {"head.json", "head.safetensors", "README.md", "config.yaml",
              "saelens/cfg.json", "saelens/sae_weights.safetensors"}  # fmt: skip
    if record:
        wanted |= {"record/summary.json", "record/losses.csv", "saelens/sparsity.safetensors"}
    assert wanted <= files.keys()
    assert not any(name.endswith((".ckpt", ".html", ".pt")) for name in files)
    # no secret and no folder of this machine, in what was sent altogether
    for data in [*hub.bodies, *files.values()]:
        for secret in (TOKEN, "a-password", str(tmp_path)):
            assert secret.encode() not in data
    _, head, text = files["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "mit"
    assert {"sparse-autoencoder", "saelens", "kanllama-lightning"} <= set(about["tags"])
    assert "## How good it is" in text
    assert "hub://me/my-sae" in text
    assert "| FVU when training ended | 0." in text
    assert "{'class'" not in text
    known = {}
    if record:
        known = json.loads((run_folder / "eval" / "summary.json").read_text())
        assert "in nats per token" in text
        for key in ("sparsity/{}/l0", "losses/{}/ce_recon"):
            figure = known[key.format(next(iter(known["sets"])))]
            assert (f"{figure:.2f}" if "l0" in key else f"{figure:.4f}") in text
    else:
        assert "nothing is known of its quality" in text
    # what is there is the head, for us and for SAELens' format
    ours = SAEHead.load(run_folder / "head")
    runs = tmp_path / "elsewhere"
    again = load("hub://me/my-sae", runs_dir=runs, lm=json.loads(
        (run_folder / "head" / "head.json").read_text())["provenance"]["lm"])  # fmt: skip
    weights = ours.state_dict()
    assert all(weights[k].equal(v.cpu()) for k, v in again.head.state_dict().items())
    other, origin = read_foreign(_fetched_saelens(runs))
    assert other.d_sae == ours.d_sae
    assert origin.site is not None
    assert origin.site.name == "blocks.1.hook_mlp_out"


def _fetched_saelens(runs: Path) -> Path:
    from kanllama_lightning.runs.lookup import folder_named

    return folder_named("hub://me/my-sae/saelens", str(runs))


def test_what_is_sent_holds_no_text_no_folder_and_no_markup_of_others(
    run_folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a record whose text has a name of markup, and tables that hold what was asked about."""
    subject = read_subject(run_folder)
    record = run_folder / "eval"
    record.mkdir(exist_ok=True)
    name = "a](http://evil) <img src=x>|`b`"
    known = {
        "head_sha256": subject.sha256,
        "sets": {name: {"tokens": 5, "text": "/home/somebody/thesis.txt"}},
        f"sparsity/{name}/l0": 4.0,
        "logger": {"api_key": "0123456789", "said": f"logged in by hf_{'z' * 34}"},
        "note": "read (/home/somebody/a.txt,/home/somebody/b.txt), file:///home/somebody/c",
    }
    (record / "summary.json").write_text(json.dumps(known))
    pair = "subject,story1,story2,score\r\nage,a story,another story,0.5\r\n"
    (record / "ce_bench.csv").write_text(pair)
    (record / "capability.csv").write_text("category,prompt,said,rank\r\nown,a story,another,1\r\n")
    (record / "mine.csv").write_text("a story")
    assert publish(run_folder) == 0
    capsys.readouterr()
    files = hub.repositories["me/my-sae"]
    assert "record/mine.csv" not in files
    assert files["record/ce_bench.csv"] == b"subject,score\r\nage,0.5\r\n"
    assert files["record/capability.csv"] == b"category,rank\r\nown,1\r\n"
    for data in files.values():
        for word in (b"somebody", b"a story", b"0123456789", b"zzzz"):
            assert word not in data
    assert json.loads(files["record/summary.json"])["note"] == "read (a.txt,b.txt), c"
    text = files["README.md"].decode()
    assert "| figure | `a](http://evil) <img src=x>/'b' 5 tokens` |" in text
    # a record that somebody edited, and what is in the way
    (record / "summary.json").write_text(json.dumps(known | {f"sparsity/{name}/l0": "many"}))
    assert publish(run_folder) == 2
    assert "a figure is no number" in capsys.readouterr().err
    assert not (run_folder / "published.tmp").exists()
    (run_folder / "published.tmp").write_text("mine")
    assert publish(run_folder) == 2
    assert "is no folder, and what is sent is put together there" in capsys.readouterr().err
    assert (run_folder / "published.tmp").read_text() == "mine"


def test_a_command_goes_on_where_the_hub_failed(
    run_folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail_next.append(("/commit/main", 400))
    assert publish(run_folder) == 2
    assert "the same command again" in capsys.readouterr().err
    sent = [path for verb, path in hub.requests if verb == "PUT"]
    assert sent
    assert publish(run_folder) == 0
    assert [path for verb, path in hub.requests if verb == "PUT"] == sent  # none of it again
    assert "head.safetensors" in hub.repositories["me/my-sae"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["publish", "{run}"], "a run and where it goes"),
        (["publish", "{run}", "no-owner"], "must be OWNER/NAME"),
        (["publish", "{run}", "me/a name"], "must be OWNER/NAME"),
        (["publish", "{run}", "me/x\n"], "must be OWNER/NAME"),
        (["publish", "{run}", "mé/ünï"], "letters a to z, digits"),
        (["publish", "{run}", "me/x/../y"], "must be OWNER/NAME"),
        (["publish", "{run}", "me/x", "--license", "mit\n---\n# free"], "must be the short name"),
        (["publish", "{run}", "me/x", "--license", ""], "must be the short name"),
        (["publish", "{run}/none", "me/x"], "no such folder"),
        (["report", "hub://me/none"], "does not give it out (404)"),
        (["report", "hub://me"], "no address on the hub"),
        (["report", "hub://me/x/../../y"], "no address on the hub"),
        (["report", "hub:me/x"], "no address on the hub"),
        (["report", "hub://me/..@main"], "no address on the hub"),
        (["report", "hub://me/x@../y"], "no address on the hub"),
        (["report", "hub://me/x/./y"], "no address on the hub"),
        (["report", "hub://-me/x"], "no address on the hub (Repo id must use"),
        (["report", "hub://me/x.git"], "no address on the hub (Repo_id cannot end"),
        (["report", "hub://mé/x"], "no address on the hub"),
    ],
)
def test_mistakes_are_one_line(
    typed: list[str], said: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kanllama_lightning.cli import main

    assert main.evaluate([one.format(run=run_folder) for one in typed]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_who_may_not_write_is_told(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert publish(run_folder) == 2
    err = capsys.readouterr().err
    assert "hf auth login" in err
    assert "x" * 34 not in err


def test_a_repository_of_several_asks_which(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private["other/many"] = False
    hub.repositories["other/many"] = {
        f"layer_{i}/{file}": b"{}" for i in range(5) for file in ("cfg.json", "code.py")
    }
    assert evaluate(["report", "hub://other/many", "--runs_dir", str(tmp_path)]) == 2
    assert "hub://other/many/layer_0, hub://other/many/layer_1" in capsys.readouterr().err
    # of one of them tensors, tables and settings are fetched, and no code
    assert evaluate(["report", "hub://other/many/layer_1", "--runs_dir", str(tmp_path)]) == 2
    fetched = [p.name for p in tmp_path.rglob("*") if p.is_file() and ".cache" not in p.parts]
    assert fetched == ["cfg.json"]


def test_what_was_fetched_is_used_where_there_is_no_network(
    run_folder: Path, hub: Hub, tmp_path: Path
) -> None:
    from kanllama_lightning.runs.lookup import folder_named

    assert publish(run_folder) == 0
    first = folder_named("hub://me/my-sae", str(tmp_path / "runs2"))
    hub.close()
    assert folder_named("hub://me/my-sae", str(tmp_path / "runs2")) == first
    with pytest.raises(InputError, match="cannot be reached"):
        folder_named("hub://me/other", str(tmp_path / "runs2"))


def test_what_answers_and_is_no_hub_is_one_line(
    run_folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page to log in to a network, say; and a place to fetch to that is none."""
    hub.fail_next += [("/api/models", 200), ("/api/repos", 200)]
    assert evaluate(["report", "hub://me/x", "--runs_dir", str(tmp_path)]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert publish(run_folder) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
    hub.fail_next.clear()
    assert publish(run_folder) == 0
    (tmp_path / "file").write_text("")
    assert evaluate(["report", "hub://me/my-sae", "--runs_dir", str(tmp_path / "file")]) == 2
    assert "choose another with --runs_dir FOLDER" in capsys.readouterr().err


def test_addresses() -> None:
    assert parsed("hub://a/b", "RUN") == ("a/b", "", None)
    assert parsed("hub://a/b/c/d=1@main", "RUN") == ("a/b", "c/d=1", "main")
    assert parsed("hub://a/b@refs/pr/1", "RUN").local == "a--b@refs--pr--1"
    assert parsed("hub://a/b/c", "RUN").local == "a--b--c"
