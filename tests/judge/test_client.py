"""The judge's client against a real server that misbehaves."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanllama_lightning.judge.budget import Prices, estimate_tokens
from kanllama_lightning.judge.client import LENGTHS, Answer, Judge, JudgeQuestion, JudgeSettings
from kanllama_lightning.judge.endpoint import Endpoint, discreet
from kanllama_lightning.judge.replies import REFUSED
from kanllama_lightning.types import InputError
from tests.judge_server import JudgeServer, Reply, completion, error

KEY = "sk-very-secret-key-0123456789"


def question(n: int = 0) -> JudgeQuestion:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": f"question {n}"}]
    labels = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    return JudgeQuestion(messages, "labels", {"type": "object", "properties": {"labels": labels}})


def parse(content: str) -> int:
    try:
        return int(content)
    except ValueError:
        raise ValueError("no number") from None


def fine(body: Any) -> str:
    return body["messages"][1]["content"].split()[1]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Asked:
    """What came of questions, and the judge afterwards."""

    def __init__(self, answers: list[Answer[int]], judge: Judge) -> None:
        self.answers, self.judge = answers, judge
        self.first = answers[0]


def ask(url: str, cache: Path, n: int = 1, **changed: Any) -> Asked:
    how = {"model": "m", "max_tokens": 50, "seed": 3, "concurrency": 4, "timeout": 5.0}
    how["retries"] = 3
    how |= {k: v for k, v in changed.items() if k in how}
    limit = changed.get("max_cost", 1.0)

    async def go() -> Asked:
        judge = Judge(
            Endpoint(url, "base_url"), JudgeSettings(**how), cache, Prices(1000.0, 1000.0), limit
        )
        async with judge:
            answers = await asyncio.gather(*(judge.ask(question(i), parse) for i in range(n)))
        return Asked(list(answers), judge)

    with discreet():
        return asyncio.run(go())


def test_what_is_sent_and_what_is_kept(tmp_path: Path) -> None:
    with JudgeServer(fine) as server:
        asked = ask(server.url, tmp_path / "c", n=2, max_cost=10.0)
    assert [a.value for a in asked.answers] == [0, 1]
    assert asked.first == Answer(0, None, False, 1, 900, 30)
    assert asked.judge.budget.spent == pytest.approx(2 * 0.93)
    sent = server.requests[0]
    assert sent["model"] == "m"
    assert sent["temperature"] == 0
    assert sent["seed"] == 3
    assert sent["max_tokens"] == 50
    assert sent["response_format"]["json_schema"]["strict"] is True
    assert sent["response_format"]["json_schema"]["schema"] == question().schema
    headers = {k.lower(): v for k, v in server.headers[0].items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    files = sorted((tmp_path / "c").iterdir())
    assert len(files) == 2
    kept = json.loads(files[0].read_text())
    assert kept["key"] == files[0].stem
    assert len(kept["key"]) == 64
    assert kept["reply"]["content"] in ("0", "1")
    assert kept["reply"]["finish_reason"] == "stop"
    assert kept["reply"]["usage"]["prompt_tokens"] == 900
    assert kept["request"]["messages"][1]["content"].startswith("question")


def test_the_disk_answers_without_a_server(tmp_path: Path) -> None:
    with JudgeServer(fine) as server:
        ask(server.url, tmp_path, n=3, max_cost=10.0)
    again = ask(server.url, tmp_path, n=3, max_cost=0.0)
    assert [a.value for a in again.answers] == [0, 1, 2]
    assert again.judge.asked == 0
    other = ask(server.url, tmp_path, n=1, seed=4)
    assert other.first.value is None
    assert other.judge.stopped is not None


def test_a_damaged_file_is_asked_for_again(tmp_path: Path, caplog: Any) -> None:
    with JudgeServer(fine) as server:
        ask(server.url, tmp_path, n=3, max_cost=10.0)
        a, b, c = sorted(tmp_path.iterdir())
        a.write_text(a.read_text()[:40])
        b.write_bytes(b"\xff\xfe")
        c.write_text(json.dumps(json.loads(c.read_text()) | {"key": "another"}))
        assert [x.value for x in ask(server.url, tmp_path, n=3, max_cost=10.0).answers] == [0, 1, 2]
        assert len(server.requests) == 6
    assert "damaged" in caplog.text
    json.loads(a.read_text())


@pytest.mark.parametrize(
    ("reply", "times"),
    [
        (error(429, "rate_limit"), 3),
        (error(503), 1),
        (Reply(body=completion("0"), cut=True), 1),
        (Reply(body=completion("0"), delay=3.0), 1),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_passes(reply: Reply, times: int, tmp_path: Path) -> None:
    with JudgeServer(fine, lambda _body, n: reply if n < times else None) as server:
        asked = ask(server.url, tmp_path, timeout=0.5 if reply.delay else 5.0)
    assert asked.first.value == 0
    assert len(server.requests) == times + 1
    assert not asked.judge.lost
    assert len(list(tmp_path.iterdir())) == 1
    # a try that got no reply may be billed, one that was turned away is not
    billed = 0 if reply.status != 200 else asked.judge.most(question())
    assert asked.judge.budget.spent == pytest.approx(0.93 + billed)


def test_a_server_that_asks_to_wait_is_obeyed(tmp_path: Path) -> None:
    reply = error(429, headers=(("retry-after", "1"),))
    with JudgeServer(fine, lambda _body, n: reply if n < 1 else None) as server:
        start = time.monotonic()
        ask(server.url, tmp_path)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    "reply",
    [error(500), error(429), Reply(body=completion("0"), cut=True)],
    ids=["500", "429", "cut"],
)
def test_what_lasts_is_no_answer_and_asked_for_another_time(reply: Reply, tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        return reply if body["messages"][1]["content"] == "question 1" else None

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, n=3, max_cost=10.0, retries=1)
        assert [a.value for a in asked.answers] == [0, None, 2]
        assert asked.answers[1].lost
        assert "no answer" in (asked.answers[1].failure or "")
        assert asked.judge.stopped is None
        assert len(asked.judge.lost) == 1
        assert len(server.requests) == 2 + 2
        server.misbehave = None
        again = ask(server.url, tmp_path, n=3, max_cost=10.0)
        assert [a.value for a in again.answers] == [0, 1, 2]
        assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("reply", "failure", "calls"),
    [
        (Reply(body=completion(None, refusal="I will not")), "refused", 1),
        (Reply(body=completion("", finish="content_filter")), "refused", 1),
        (error(400, "content_filter"), "refused", 1),
        (Reply(body=completion("7", finish="length")), "truncated", 2),
        (Reply(body=completion("{not JSON")), "no number", 2),
        (Reply(body=completion(None)), "no text", 2),
        (Reply(body="<html>a proxy</html>"), "no text", 2),
        (Reply(body={"choices": []}), "no text", 2),
        (Reply(body=[1]), "no text", 2),
        (error(400, "context_length_exceeded"), "not taken (context_length_exceeded)", 1),
    ],
    ids=lambda v: str(v)[:60],
)
def test_what_is_no_answer(reply: Reply, failure: str, calls: int, tmp_path: Path) -> None:
    with JudgeServer(fine, lambda _body, _n: reply) as server:
        asked = ask(server.url, tmp_path, max_cost=10.0)
        assert asked.first.value is None
        assert asked.first.failure == failure
        assert not asked.first.lost
        assert len(server.requests) == calls
        if reply.status == 200:
            ask(server.url, tmp_path)
            assert len(server.requests) == calls


def test_a_reply_that_was_cut_off_gets_more_room(tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        short = body["max_tokens"] < 200
        return Reply(body=completion("0", finish="length")) if short else None

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, max_cost=10.0)
        assert asked.first == Answer(0, None, False, 2, 1800, 60)
        assert [body["max_tokens"] for body in server.requests] == [50, 200]
        again = ask(server.url, tmp_path, max_cost=10.0)
        assert (again.first, len(server.requests)) == (asked.first, 2)


def test_the_first_reply_shows_whether_the_schema_binds(tmp_path: Path, caplog: Any) -> None:
    def words(_body: Any, _n: int) -> Reply:
        return Reply(body=completion("Sure! Here it is."))

    with JudgeServer(fine, words) as server:
        ask(server.url, tmp_path / "a", n=3, max_cost=20.0)
    assert caplog.text.count("does not keep to it (no number)") == 1
    for begun, times in (("Sure! Here", 1), ('{"labels": [1', 0), ("<think>I", 0), (None, 0)):
        caplog.clear()
        cut = Reply(body=completion(begun, finish="length"))
        with JudgeServer(fine, lambda _body, _n, cut=cut: cut) as server:
            ask(server.url, tmp_path / f"cut {begun}", n=2, max_cost=20.0)
        assert caplog.text.count("does not keep to it (its answer is no JSON)") == times
    caplog.clear()
    with JudgeServer(fine) as server:
        ask(server.url, tmp_path / "b", n=3, max_cost=20.0)
    assert "keep to it" not in caplog.text


def test_the_first_silence_names_the_option(tmp_path: Path, caplog: Any) -> None:
    with JudgeServer(fine, lambda _body, _n: Reply(delay=1.0)) as server:
        asked = ask(server.url, tmp_path, n=3, timeout=0.2, retries=0, max_cost=20.0)
    assert all(answer.lost for answer in asked.answers)
    assert caplog.text.count("--interpretability.timeout SECONDS") == 1


def test_a_silent_server_is_asked_twice_at_most(tmp_path: Path, caplog: Any) -> None:
    with JudgeServer(fine, lambda _body, _n: Reply(delay=5.0)) as server:
        begun = time.monotonic()
        asked = ask(server.url, tmp_path, n=9, timeout=0.2, retries=9, concurrency=1, max_cost=20.0)
        assert time.monotonic() - begun < 4
        assert len(server.requests) == 3 * 2
    assert "3 calls got no answer (no reply in 0.2 s)" in str(asked.judge.stopped)
    assert "--interpretability.timeout" in str(asked.judge.stopped)
    assert caplog.text.count("--interpretability.timeout SECONDS") == 1


def test_a_second_answer_counts(tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        return Reply(body=completion("{")) if body["seed"] == 3 else None

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, max_cost=10.0)
    assert asked.first == Answer(0, None, False, 2, 1800, 60)
    assert [body["seed"] for body in server.requests] == [3, 4]


@pytest.mark.parametrize(
    ("parameter", "instead"),
    [
        ("temperature", None),
        ("seed", None),
        ("max_tokens", "max_completion_tokens"),
        ("response_format", "response_format"),
    ],
)
@pytest.mark.parametrize("form", ["param", "message", "detail"])
def test_parameters_that_are_not_taken(
    parameter: str, instead: str | None, form: str, tmp_path: Path, caplog: Any
) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        if parameter not in body or "minItems" not in json.dumps(body) and instead == parameter:
            return None
        if form == "param":
            return error(400, "unsupported_parameter", parameter)
        if form == "message":
            return error(400, message=f"Unsupported parameter: '{parameter}' is not supported.")
        return Reply(422, {"detail": [{"loc": ["body", parameter], "msg": "extra"}]})

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, n=6, max_cost=10.0)
        assert [a.value for a in asked.answers] == list(range(6))
        assert len(server.requests) == 7
        assert caplog.text.count("left out from now on") == 1
        (tmp_path / f"{asked.judge._key(question(5), 0, 50)}.json").unlink()
        again = ask(server.url, tmp_path, n=6, max_cost=10.0)
        assert again.judge.refused == asked.judge.refused
        assert len(server.requests) == 8
    last = server.requests[-1]
    assert (parameter in last) == (instead == parameter)
    if instead is not None:
        assert last[instead]
    assert "minItems" not in json.dumps(last) or instead != parameter
    assert (tmp_path / REFUSED).is_file()


def test_a_server_that_knows_no_schema(tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        return error(400, "x", "response_format") if "response_format" in body else None

    with JudgeServer(fine, misbehave) as server:
        assert ask(server.url, tmp_path, max_cost=10.0).first.value == 0
    formats = [body.get("response_format", {}).get("type") for body in server.requests]
    assert formats == ["json_schema", "json_schema", "json_object", None]


LLAMA_CPP = (
    "1 validation error:\n  {'type': 'literal_error', 'loc': ('body', 'response_format', 'type'), "
    "'msg': \"Input should be 'text' or 'json_object'\", 'input': 'json_schema', 'ctx': "
    "{'expected': \"'text' or 'json_object'\"}}\n\n  File \"app.py\", line 376"
)


def test_llama_cpp_knows_the_older_type_alone_and_answers_500(tmp_path: Path, caplog: Any) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        older = body["response_format"]["type"] == "json_object"
        return None if older else error(500, "internal_server_error", message=LLAMA_CPP)

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, n=6, max_cost=10.0)
        again = ask(server.url, tmp_path, n=7, max_cost=10.0)
    assert [a.value for a in asked.answers] == list(range(6))
    assert again.answers[6].value == 6
    assert len(server.requests) == 1 + 7
    kept = {"type": "json_object", "schema": question().schema}
    assert all(body["response_format"] == kept for body in server.requests[1:])
    assert caplog.text.count("does not take json_schema: asked as json_object") == 1


def test_a_500_is_an_objection_only_if_it_names_one_parameter(tmp_path: Path) -> None:
    def names_one(body: Any, _n: int) -> Reply | None:
        return error(500, message="bad field:\nseed") if "seed" in body else None

    with JudgeServer(fine, names_one) as server:
        assert ask(server.url, tmp_path / "a").first.value == 0
        assert len(server.requests) == 2
    with JudgeServer(fine, lambda body, _n: error(500, message=json.dumps(body))) as server:
        asked = ask(server.url, tmp_path / "b", retries=2)
        assert (asked.first.failure, len(server.requests)) == ("no answer (answer 500)", 3)
    assert not asked.judge.refused


@pytest.mark.parametrize("parameter", ["max_tokens", "max_completion_tokens", "response_format"])
def test_objections_without_end_are_given_up(parameter: str, tmp_path: Path) -> None:
    with JudgeServer(fine, lambda _body, _n: error(400, "x", parameter)) as server:
        asked = ask(server.url, tmp_path, n=6)
    assert {a.failure for a in asked.answers} == {"not taken (x)"}
    assert len(server.requests) <= 6 + 3


def test_calls_under_way_take_one_step_together(tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        first = body["messages"][1]["content"] == "question 0"
        long = "minItems" in json.dumps(body["response_format"])
        return error(400, "x", "response_format") if long and not first else None

    with JudgeServer(fine, misbehave, delay=0.1) as server:
        asked = ask(server.url, tmp_path, n=5, max_cost=20.0)
    assert [a.value for a in asked.answers] == list(range(5))
    assert asked.judge.refused == {LENGTHS}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, "invalid_api_key", message=f"Incorrect key: {KEY}"), "OPENAI_API_KEY"),
        (error(403), "OPENAI_API_KEY"),
        (error(404, "model_not_found"), "interpretability.model='m'"),
        (error(400, "x", "model"), "interpretability.model='m'"),
        (Reply(400, {"detail": "Server is pinned to 'other'"}), "interpretability.model='m'"),
        (error(429, "insufficient_quota"), "insufficient_quota"),
        (error(402), "answers 402"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_ends_everything(reply: Reply, said: str, tmp_path: Path) -> None:
    def misbehave(body: Any, _n: int) -> Reply | None:
        return None if body["messages"][1]["content"] == "question 0" else reply

    with JudgeServer(fine, misbehave) as server:
        asked = ask(server.url, tmp_path, n=40, max_cost=100.0)
    assert asked.first.value == 0
    assert isinstance(asked.judge.stopped, InputError)
    assert said in str(asked.judge.stopped)
    assert KEY not in str(asked.judge.stopped)
    assert all(a.lost for a in asked.answers[1:])
    assert len(server.requests) <= 1 + 4 * (4 if reply.status == 429 else 1)
    assert len(list(tmp_path.iterdir())) == 1


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        asked = ask(url, tmp_path, n=50, max_cost=100.0, retries=0)
    assert "no connection" in str(asked.judge.stopped)
    assert len(asked.judge.lost) == 1
    assert {a.failure for a in asked.answers[1:]} == {"not asked"}
    assert asked.judge.budget.spent == 0


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    with JudgeServer(
        fine, lambda _body, _n: error(500) if len(server.asked) > 5 else None
    ) as server:
        asked = ask(server.url, tmp_path, n=60, max_cost=100.0, retries=1)
    assert "calls got no answer" in str(asked.judge.stopped)
    assert 5 <= sum(a.value is not None for a in asked.answers) <= 6
    assert len(asked.judge.lost) < 20


def test_the_budget_holds_while_asking(tmp_path: Path) -> None:
    """Each call may cost 0.05 USD of output and some of input; every one that came cost 0.93."""
    with JudgeServer(fine) as server:
        asked = ask(server.url, tmp_path, n=20, max_cost=3.0)
        most = asked.judge.most(question())
        assert 0.05 < most < 0.5
        n = len(server.requests)
        assert n >= 3
        assert (n - 4) * 0.93 <= 3.0 - most
        assert "max_cost=3.0" in str(asked.judge.stopped)
        assert sum(a.value is not None for a in asked.answers) == n
        rest = ask(server.url, tmp_path, n=20, max_cost=100.0)
        assert [a.value for a in rest.answers] == list(range(20))
        assert len(server.requests) == 20


def test_the_budget_is_never_passed_if_estimates_hold(tmp_path: Path) -> None:
    def cheap(_body: Any, _n: int) -> Reply:
        return Reply(body=completion("1", usage=(20, 30)), delay=0.005)

    with JudgeServer(fine, cheap) as server:
        asked = ask(server.url, tmp_path, n=30, max_cost=0.6)
    spent = len(server.requests) * 0.05
    most = asked.judge.most(question())
    assert spent <= 0.6
    assert spent > 0.6 - most - 0.05


def test_the_budget_holds_for_repetitions(tmp_path: Path) -> None:
    silent = Reply(body=completion("0"), cut=True)
    with JudgeServer(fine, lambda _body, _n: silent) as server:
        asked = ask(server.url, tmp_path, n=4, max_cost=0.25, retries=20)
        most = asked.judge.most(question())
        assert len(server.requests) == 0.25 // most
    assert "max_cost=0.25" in str(asked.judge.stopped)
    assert asked.judge.budget.spent == pytest.approx(len(server.requests) * most)


def test_replies_without_usage(tmp_path: Path) -> None:
    with JudgeServer(fine, lambda _body, _n: Reply(body=completion("5", usage=None))) as server:
        asked = ask(server.url, tmp_path)
    assert asked.first == Answer(5, None, False, 1, None, None)
    assert asked.judge.budget.spent == pytest.approx(asked.judge.most(question()))


def test_estimates_are_rather_too_high() -> None:
    messages = [{"role": "user", "content": "The cat sat on the mat. " * 50}]
    assert 6 * 50 < estimate_tokens(messages, {}) < 3 * 6 * 50
    assert estimate_tokens([{"role": "user", "content": "猫" * 90}], {}) >= 90


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "https://me:pass-word-1@example.org:8443/v1?token=query-secret-1"
    endpoint = Endpoint(secret, "base_url")
    assert endpoint.shown == "https://example.org:8443/v1"
    assert endpoint.scrubbed(f"{KEY} pass-word-1 query-secret-1 me") == "[secret] " * 3 + "me"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://[::1]:1/v1")
    assert Endpoint(None, "base_url").shown == "http://[::1]:1/v1"
    for wrong in ("example.org/secret", "ftp://secret", "http://", "http://x:secret/", "secret"):
        with pytest.raises(InputError, match="is no address") as caught:
            Endpoint(wrong, "base_url")
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_key_is_needed_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    Endpoint(None, "base_url")
    monkeypatch.delenv("OPENAI_API_KEY")
    Endpoint("http://localhost:8000/v1", "base_url")
    for official in (None, "https://api.openai.com/v1"):
        with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
            Endpoint(official, "base_url")


def test_user_and_query_of_an_address_are_used_and_not_shown(tmp_path: Path, caplog: Any) -> None:
    def echo(_body: Any, _n: int) -> Reply:
        return Reply(body=completion("5") | {"model": f"{KEY} hidden-pass hidden-token"})

    caplog.set_level(logging.DEBUG)
    with JudgeServer(fine, echo) as server:
        url = f"http://user:hidden-pass@127.0.0.1:{server.port}/v1?token=hidden-token"
        assert ask(url, tmp_path).first.value == 5
        headers = {k.lower(): v for k, v in server.headers[0].items()}
    assert server.queries == ["token=hidden-token"]
    assert headers["authorization"].startswith("Basic ")
    written = caplog.text + "".join(p.read_text() for p in tmp_path.iterdir())
    for secret in (KEY, "hidden-pass", "hidden-token", headers["authorization"][6:]):
        assert secret not in written


def test_secrets_stay_out_of_errors(tmp_path: Path) -> None:
    said: Callable[..., Reply] = lambda *_: error(401, message=f"no: {KEY} hidden-pass")  # noqa: E731
    with JudgeServer(fine, said) as server:
        url = f"http://user:hidden-pass@127.0.0.1:{server.port}/v1"
        asked = ask(url, tmp_path)
    assert KEY not in str(asked.judge.stopped)
    assert "hidden-pass" not in str(asked.judge.stopped)
    assert f"http://127.0.0.1:{server.port}/v1" in str(asked.judge.stopped)
