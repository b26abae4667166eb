"""`evaluate.py report RUN --reports interpretability`, against a judge on this machine."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from kanllama_lightning.cli.evaluate_command import main
from kanllama_lightning.heads import DenseOnlyKAN
from kanllama_lightning.judge.panel import HEAD, RANDOM, SHUFFLED
from kanllama_lightning.reports.interpretability_report import InterpretabilityReport
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.types import InputError
from tests.conftest import rest_slow
from tests.judge_server import (
    Body,
    JudgeServer,
    Reply,
    completion,
    error,
    is_explain,
    n_windows,
    plain_judge,
)

KEY = "sk-very-secret-key-0123456789"
HOSTILE = '<script>alert(1)</script> =1+1 <b>\n"x", ]]> {{7*7}} </td>'
COLUMNS = [
    "subject", "latent", "frequency", "category", "score", "explanation", "detection", "n_explain",
    "n_detect", "input_tokens", "output_tokens", "cost", "status",
]  # fmt: skip
NAME = "interpretability"


def judge(body: Body) -> str:
    """Tells latents apart, and windows by their length."""
    text = body["messages"][1]["content"]
    if is_explain(body):
        n = sum(map(ord, text)) % 3
        answer = {"category": ["low_level", "high_level", "undiscernible"][n], "score": 5 - n}
        return json.dumps(answer | {"explanation": f"{HOSTILE} {len(text)}"})
    lines = [line for line in text.splitlines() if re.match(r"\d+\. ", line)]
    return json.dumps({"labels": [len(line) % 2 for line in lines]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with JudgeServer(judge) as running:
        yield running


@pytest.fixture
def run(runs: Path, text_file: Path) -> Path:
    """A finished run, and more text beside it than was held out."""
    shutil.copy(text_file, runs / "words.jsonl")
    return runs / "seed0"


def call(run: Path, url: str | None, *more: Any, **changed: Any) -> int:
    given = {"latents": 4, "controls": 2, "windows": 20, "retries": 1, "width": 12, "timeout": 5}
    given |= {"base_url": url} if url else {}
    args = ["report", run, "--reports", NAME, "--documents", 100, "--wandb", "false"]
    args += ["--text", run.parent / "words.jsonl"]
    args += [f"--{NAME}.{k}={v}" for k, v in (given | changed).items()]
    return main([str(a) for a in [*args, *more]])


def record(run: Path) -> Path:
    """Where the record of a text of one's own is; a folder that is not there before it is made."""
    return next((run / "eval").glob("words.jsonl-*"), run / "eval" / "words.jsonl")


def table(run: Path) -> pd.DataFrame:
    return pd.read_csv(record(run) / f"{NAME}.csv", keep_default_na=False, na_values=[""])


def figures(run: Path) -> dict[str, Any]:
    found = json.loads((record(run) / "summary.json").read_text())
    return {k.removeprefix(f"{NAME}/"): v for k, v in found.items() if k.startswith(f"{NAME}/")}


def replies(run: Path) -> list[Path]:
    return [p for p in (record(run) / "judge").glob("*.json") if len(p.stem) == 64]


class Judged(NamedTuple):
    """A run with its record, and what was asked for it by a server that is gone."""

    run: Path
    url: str
    requests: list[Body]
    text: tuple[str, Path]
    """Argument that names the text, by whose place the record knows it."""


@pytest.fixture(scope="module")
def judged(trained: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Made once; not to be changed."""
    runs = shutil.copytree(trained, tmp_path_factory.mktemp("judged") / "runs")
    shutil.copy(text_file, runs / "words.jsonl")
    with pytest.MonkeyPatch.context() as patch, JudgeServer(judge) as server:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert call(runs / "seed0", server.url) == 0
    text = ("--text", runs / "words.jsonl")
    return Judged(runs / "seed0", server.url, server.requests, text)


@pytest.fixture
def known(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """A copy of the record, to be changed at will."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    runs = shutil.copytree(judged.run.parent, tmp_path / "judged")
    return judged._replace(run=runs / "seed0")


def test_the_whole_record(known: Judged) -> None:
    run = known.run
    made = table(run)
    assert list(made.columns) == COLUMNS
    assert made["subject"].tolist() == [HEAD] * 4 + [RANDOM] * 2 + [SHUFFLED] * 2
    assert (made["status"] == "ok").all()
    assert made["detection"].between(0, 1).all()
    own, shuffled = made[made["subject"] == HEAD], made[made["subject"] == SHUFFLED]
    assert own["latent"].tolist() == sorted(own["latent"])
    assert own["score"].isin([3, 4, 5]).all()
    assert shuffled[["category", "score"]].isna().all(axis=None)
    explained = dict(zip(own["latent"], own["explanation"], strict=True))
    for latent, text in zip(shuffled["latent"], shuffled["explanation"], strict=True):
        assert text in explained.values()
        assert text != explained[latent]
    calls = len(known.requests)
    assert calls == len(replies(run))
    per_latent = 1 + -(-own["n_detect"] // 10)
    assert own["input_tokens"].tolist() == (900 * per_latent).tolist()
    assert own["cost"].to_numpy() == pytest.approx((900 * 2.5 + 30 * 10) * per_latent / 1e6)

    found = figures(run)
    assert found["calls"] == calls
    assert found["input_tokens"] == 900 * calls
    assert found["cost"] == pytest.approx(calls * (900 * 2.5 + 30 * 10) / 1e6)
    assert (found["n_judged"], found["n_failed"]) == (4, 0)
    assert found["n_alive"] + found["n_dead"] == 32
    assert found["detection"] == pytest.approx(own["detection"].mean())
    assert found["detection_low"] <= found["detection"] <= found["detection_high"]
    assert found["score"] == pytest.approx(own["score"].mean())
    share = (found["n_alive"] - found["n_skipped"]) / found["n_alive"]
    alive = share * found["detection"] + (1 - share) * 0.5
    assert found["alive/detection"] == pytest.approx(alive)
    assert found["alive/score"] == pytest.approx(share * found["score"] + (1 - share))
    of_all = found["n_alive"] / 32
    assert found["all/detection"] == pytest.approx(of_all * alive + (1 - of_all) * 0.5)
    assert sum(found[f"category/{c}"] for c in ("low_level", "high_level", "undiscernible")) \
        == pytest.approx(1)  # fmt: skip
    for control in (RANDOM, SHUFFLED):
        name = control.replace(" ", "_")
        mean = made[made["subject"] == control]["detection"].mean()
        assert found[f"{name}/detection"] == pytest.approx(mean)
        assert found[f"over_{name}/detection"] == pytest.approx(found["detection"] - mean)
        assert found[f"over_{name}/detection_low"] <= found[f"over_{name}/detection_high"]
    assert found["model"] == "gpt-4o-2024-08-06"
    assert found["dropped_parameters"] is None

    html = (record(run) / f"{NAME}.html").read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "<b>" not in html.split("<body>")[1].split("<p>")[1].split("</p>")[0]
    for word in (HEAD, RANDOM, SHUFFLED, "chance"):
        assert word in html

    assert call(run, known.url, *known.text) == 0  # it is there already: nobody is asked


def test_intervals_by_an_independent_bootstrap(run: Path, server: JudgeServer) -> None:
    assert call(run, server.url, latents=12, controls=0) == 0
    values = table(run).query("subject == 'head'")["detection"].to_numpy()
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = figures(run)
    assert found["detection_low"] == pytest.approx(low, abs=0.01)
    assert found["detection_high"] == pytest.approx(high, abs=0.01)


def test_without_a_server_the_disk_says_the_same(known: Judged, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    run = known.run
    before = (record(run) / f"{NAME}.csv").read_bytes()
    found = figures(run)
    assert call(run, known.url, *known.text, "--again", "true", max_cost=0) == 0
    assert (record(run) / f"{NAME}.csv").read_bytes() == before
    assert figures(run) == found
    assert f"0 calls ({len(known.requests)} more are known)" in caplog.text


MISBEHAVIOUR = {
    "refusal": (Reply(body=completion(None, refusal="no")), "refused"),
    "content filter": (Reply(body=completion("", finish="content_filter")), "refused"),
    "truncated": (Reply(body=completion('{"score": 5', finish="length")), "truncated"),
    "malformed": (Reply(body=completion('{"score": 5')), "malformed JSON"),
    "schema": (Reply(body=completion('{"score": 5}')), "wrong schema"),
    "proxy": (Reply(body="<html>"), "no text"),
}


@pytest.mark.parametrize("name", rest_slow(MISBEHAVIOUR, ["refusal", "schema"]))
@pytest.mark.parametrize("what", ["explain", "detect"])
def test_no_failure_becomes_a_score(name: str, what: str, run: Path, server: JudgeServer) -> None:
    """The judge fails on every second call of one kind."""
    reply, reason = MISBEHAVIOUR[name]

    def misbehave(body: Body, _n: int) -> Reply | None:
        text = body["messages"][1]["content"]
        hit = is_explain(body) == (what == "explain") and sum(map(ord, text)) % 2 == 0
        return reply if hit else None

    server.misbehave = misbehave
    code = call(run, server.url)
    made = table(run)
    own = made[made["subject"] == HEAD]["status"] == "ok"
    assert code == (0 if own.sum() >= (~own).sum() > 0 or own.all() else 2)
    failed = made[made["status"] != "ok"]
    assert len(failed) > 0
    assert (failed["status"] == f"{what}: {reason}").all()
    assert failed[["score", "detection", "category"]].isna().all(axis=None)
    good = made[(made["status"] == "ok") & (made["subject"] == HEAD)]
    found = figures(run)
    assert found["n_failed"] == (failed["subject"] == HEAD).sum()
    assert found["n_judged"] == len(good)
    if len(good):
        assert found["detection"] == pytest.approx(good["detection"].mean())
        assert found["score"] == pytest.approx(good["score"].mean())


def test_a_wrong_number_of_labels(run: Path, server: JudgeServer, capsys: Any) -> None:
    def short(body: Body) -> str:
        if is_explain(body):
            return plain_judge(body)
        return json.dumps({"labels": [1] * (n_windows(body) - 1)})

    server.judge = short
    assert call(run, server.url) == 2
    said = capsys.readouterr().err
    assert "only 0 of 4 latents could be judged" in said
    assert "detect: wrong number of labels" in said
    assert "Attention: only 0 of 4" in (record(run) / f"{NAME}.html").read_text()
    made = table(run)
    assert (made["status"] == "detect: wrong number of labels").all()
    found = figures(run)
    assert found["n_judged"] == 0
    assert "detection" not in found
    assert "score" not in found


def test_what_a_server_does_not_take_is_in_the_record(run: Path, server: JudgeServer) -> None:
    server.misbehave = lambda body, _n: (
        error(400, "unsupported_value", "temperature") if "temperature" in body else None
    )
    assert call(run, server.url) == 0
    assert figures(run)["dropped_parameters"] == "temperature"
    assert (table(run)["status"] == "ok").all()


def test_calls_without_an_answer_are_asked_for_again(
    run: Path, server: JudgeServer, capsys: Any
) -> None:
    server.misbehave = lambda body, _n: (
        error(500) if not is_explain(body) and "1." in body["messages"][1]["content"]
        and len(body["messages"][1]["content"]) % 3 == 0 else None
    )  # fmt: skip
    assert call(run, server.url, retries=1) == 2
    said = capsys.readouterr().err
    assert "got no answer" in said
    assert "500" in said
    made = table(run)
    lost = made[made["status"] != "ok"]
    assert lost["status"].str.contains("no answer").all()
    assert lost["detection"].isna().all()
    assert not (record(run) / f"done/{NAME}.json").exists()
    known = {p.name for p in replies(run)}
    sent = dict(server.sent)
    server.misbehave = None
    assert call(run, server.url) == 0
    assert (table(run)["status"] == "ok").all()
    assert known < {p.name for p in replies(run)}
    assert all(server.sent[key] == n for key, n in sent.items())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "invalid_api_key", message=f"Incorrect API key provided: {KEY}"), "(401)"),
        pytest.param(
            error(404, "model_not_found"), "interpretability.model=", marks=pytest.mark.slow
        ),
        (error(429, "insufficient_quota"), "insufficient_quota"),
    ],
    ids=lambda v: str(v)[:12],
)
def test_one_clear_error(
    reply: Reply, said: str, run: Path, server: JudgeServer, capsys: Any
) -> None:
    server.misbehave = lambda _body, _n: reply if len(server.sent) >= 3 else None
    assert call(run, server.url, concurrency=1) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error:") == 1
    assert KEY not in err
    assert len(replies(run)) == 3
    server.misbehave = None
    assert call(run, server.url) == 0
    assert max(server.sent.values()) == 1


def test_nobody_there(run: Path, server: JudgeServer, capsys: Any) -> None:
    server.stop()
    assert call(run, server.url) == 2
    err = capsys.readouterr().err
    assert f"'{server.url}'" in err
    assert "no connection" in err
    assert call(run, server.url, "--wandb", "true") == 2
    again = capsys.readouterr().err
    assert "no connection" in again, "and no word of what could not be sent"
    assert again.count("error:") == 1


def test_the_estimate_is_checked_before_anything_is_asked(
    run: Path, server: JudgeServer, judged: Judged, capsys: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    assert call(run, server.url, max_cost=0.001) == 2
    assert not server.requests
    assert "max_cost=0.001" in capsys.readouterr().err
    said = re.search(r"([\d,]+) calls \(0 more are known\), up to ([\d,]+) input", caplog.text)
    assert said
    assert len(judged.requests) == int(said[1].replace(",", ""))


def test_the_budget_stops_a_run_in_its_middle(run: Path, server: JudgeServer, capsys: Any) -> None:
    dear = completion("", usage=(40_000, 300))

    def misbehave(body: Body, _n: int) -> Reply:
        dear["choices"][0]["message"]["content"] = judge(body)
        return Reply(body=json.loads(json.dumps(dear)))

    server.misbehave = misbehave
    assert call(run, server.url, max_cost=1.0, concurrency=2) == 2
    err = capsys.readouterr().err
    assert "max_cost=1.0" in err
    assert 9 <= len(server.requests) <= 11  # of 0.103 USD each
    assert len(replies(run)) == len(server.requests)
    assert "not asked" in " ".join(table(run)["status"])
    assert call(run, server.url, max_cost=100) == 0
    assert max(server.asked.values()) == 1


def test_a_dry_run_needs_nobody(
    run: Path, known: Judged, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert call(run, None, dry_run="true") == 0
    lines = (record(run) / "interpretability_prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    assert sum(p["name"] == "explanation" for p in prompts) == 6
    for prompt in prompts:
        assert [m["role"] for m in prompt["messages"]] == ["system", "user"]
    said = re.search(r"would be ([\d,]+) calls", caplog.text)
    assert said
    assert not (record(run) / f"{NAME}.csv").exists()
    assert not (record(run) / "judge").exists()
    assert not (record(run) / f"done/{NAME}.json").exists()
    assert int(said[1].replace(",", "")) == len(known.requests)
    wanted = {json.dumps(p["messages"]) for p in prompts if p["name"] == "explanation"}
    assert wanted == {json.dumps(b["messages"]) for b in known.requests if is_explain(b)}
    assert call(known.run, None, *known.text, dry_run="true") == 0  # though it is made


def test_a_key_is_needed_before_the_text_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(
        "kanllama_lightning.reports.one_pass._stream", lambda *_: pytest.fail("has read")
    )
    assert call(run, None) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_no_secret_is_written_anywhere(run: Path, server: JudgeServer, capfd: Any, caplog: Any,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    secrets = [KEY, "hidden-user-1", "hidden-pass-1", "hidden-token-1"]

    def echo(body: Body, _n: int) -> Reply | None:
        said = " ".join([*secrets, *(str(h) for h in server.headers[-1].values())])
        if len(server.requests) == 5:
            return error(500, message=said)
        if len(server.requests) == 7:
            return error(400, "seed", "seed", said)
        return Reply(body=completion(judge(body)) | {"system_fingerprint": said, "model": said})

    server.misbehave = echo
    url = f"http://hidden-user-1:hidden-pass-1@127.0.0.1:{server.port}/v1?token=hidden-token-1"
    assert call(run, url) == 0
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    server.misbehave = lambda _body, _n: error(401, message=" ".join(secrets))
    assert call(run, None, "--again", "true", seed=5) == 2
    assert server.queries == ["token=hidden-token-1"] * len(server.queries)
    captured = capfd.readouterr()
    written = captured.out + captured.err + caplog.text
    files = [p for p in run.rglob("*") if p.is_file()]
    everything = written.encode() + b"".join(p.read_bytes() for p in files)
    for secret in secrets:
        assert secret.encode() not in everything, secret
    assert f"http://127.0.0.1:{server.port}/v1".encode() in everything


def test_too_little_text(run: Path, server: JudgeServer, capsys: Any) -> None:
    assert call(run, server.url, windows=131) == 2
    assert "interpretability.windows=131" in capsys.readouterr().err
    assert not server.requests


def test_without_controls(run: Path, server: JudgeServer) -> None:
    assert call(run, server.url, controls=0) == 0
    assert table(run)["subject"].unique().tolist() == [HEAD]
    assert not any(k.startswith(("random", "shuffled", "over")) for k in figures(run))


def test_a_remark_is_on_the_page_as_it_was_written(known: Judged) -> None:
    page = record(known.run) / f"{NAME}.html"
    before = page.read_text()
    assert call(known.run, known.url, *known.text, remark="A <b> judge.") == 0
    assert page.read_text() == before.replace("<p>gpt-4o", "<p>A &lt;b&gt; judge. gpt-4o", 1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("latents", 0), ("windows", 9), ("concurrency", 0), ("timeout", 0), ("max_cost", -1),
     ("max_cost", float("nan")), ("price_in", float("inf")), ("tokens", 0), ("retries", -1)],
)  # fmt: skip
def test_arguments(argument: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"interpretability.{argument}="):
        InterpretabilityReport(**{argument: value})


def test_dense_heads_have_nothing_to_tell(make_lm: Any, tmp_path: Path) -> None:
    lm = make_lm()
    head = DenseOnlyKAN(lm.d_model, 8, 4)
    reason = InterpretabilityReport().applies(EvalRun(tmp_path, head, lm, {}, ["s"], tmp_path))
    assert reason is not None
    assert "DenseOnlyKAN" in reason
