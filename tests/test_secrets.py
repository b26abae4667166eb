"""Keys, passwords and tokens reach nothing that is written or said, in none of their forms."""

import base64
import html
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from markupsafe import escape

from kanllama_lightning.cli import main as commands
from kanllama_lightning.console.secrets import Discreet, Secrets, known, learn
from kanllama_lightning.judge.endpoint import Endpoint
from tests.conftest import SMALL
from tests.hold import Forks
from tests.judge_server import Body, JudgeServer, Reply, completion, plain_judge

ROOT = Path(__file__).resolve().parents[1]
PASSWORD, TOKEN = 'pä&"s5/+w', "tok<en>77"
KEYS = {
    "OPENAI_API_KEY": "sk-very-secret-0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_hiddenhiddenhidden",
    "MY_DATABASE_PASSWORD": "correct horse battery",
}


def forms(secret: str) -> set[str]:
    """A secret as somebody may write it; made here by other means than there."""
    escaped = "".join(f"\\u{ord(c):04x}" for c in secret)
    in_json = json.dumps({"a": secret})[7:-2]
    found = {secret, quote(secret, safe=""), quote_plus(secret), in_json, html.escape(secret)}
    found.add(str(escape(secret)))
    found |= {json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="").lower()}
    found |= {json.dumps(json.loads(f'"{escaped}"'))[1:-1]}
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        found |= {encode(secret.encode()).decode(), encode(secret.encode()).decode().rstrip("=")}
    return found


@pytest.mark.parametrize("secret", [PASSWORD, TOKEN, "plainpassword", "abcd", "q7x"])
def test_every_form_of_a_password(secret: str) -> None:
    secrets = Secrets()
    secrets.add_address(f"https://me:{quote(secret, safe='')}@host/v1")
    joint = f"me:{secret}"
    for form in forms(joint) | (forms(secret) if len(secret) > 3 else set()):
        assert form not in secrets.scrubbed(f"before {form} after"), form
        assert secrets.scrubbed(f"before {form} after").startswith("before [secret]")


def test_what_is_no_secret_stays() -> None:
    secrets = Secrets()
    secrets.add_address("https://user:abcd@host:80/v1?debug=true&v=2")
    text = "the user said true: abcdef, zabcd; https://host:80/v1 2"
    assert secrets.scrubbed(text) == text
    assert secrets.scrubbed("say abcd!") == "say [secret]!"
    assert Secrets().scrubbed(text) == text
    for harmless in ("https://host/path", "runs/a:b@c", "http://[::1/", "meta-llama/Llama-3.2-1B"):
        secrets.add_address(harmless)
    assert secrets.scrubbed(text) == text


def test_a_tree_is_scrubbed_to_its_leaves() -> None:
    secrets = Secrets()
    secrets.add("swordfish")
    tree = {"a": ["swordfish", 1, None], "swordfish": {"b": "a swordfish"}}
    assert secrets.scrubbed_tree(tree) == {
        "a": ["[secret]", 1, None], "[secret]": {"b": "a [secret]"}}  # fmt: skip


def test_a_reply_with_unusual_escapes() -> None:
    """A server may write every letter as an escape: the decoded value is scrubbed as well."""
    endpoint = Endpoint(f"http://me:{quote(PASSWORD, safe='')}@localhost:1/v1", "base_url")
    escaped = "".join(f"\\u{ord(c):04x}" for c in PASSWORD)
    decoded = json.loads(endpoint.scrubbed(f'{{"content": "it is {escaped}."}}'))
    assert endpoint.scrubbed(decoded) == {"content": "it is [secret]."}


def test_they_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text("interpretability:\n  base_url: http://me:in-a-file@host/v1\n")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:in-a-proxy@proxy:3128")
    learn(["report", "runs/x", f"--config={file}", "--lm.name", "https://me:typed-one@host/llama"])
    secrets = [*KEYS.values(), "in-a-file", "in-a-proxy", "typed-one"]
    assert known.scrubbed(" ".join(secrets)) == " ".join(["[secret]"] * len(secrets))
    learn(["report", str(file)])
    assert "typed-one" in known.scrubbed("typed-one")


def test_a_pipe_that_a_command_line_names_is_not_read(tmp_path: Path) -> None:
    """Nobody may ever write into it."""
    os.mkfifo(tmp_path / "own.yaml")
    learn(["plan", "--config", str(tmp_path / "own.yaml")])


def test_log_records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEYS["HF_TOKEN"])
    learn([])
    handler = caplog.handler
    handler.addFilter(discreet := Discreet())
    try:
        try:
            raise ValueError(f"no: {KEYS['HF_TOKEN']}")
        except ValueError:
            logging.getLogger("x").exception("%s is wrong", KEYS["HF_TOKEN"])
    finally:
        handler.removeFilter(discreet)
    assert "[secret] is wrong" in caplog.text
    assert KEYS["HF_TOKEN"] not in caplog.text


def command(*args: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **environment}
    given = [sys.executable, *map(str, args)]
    return subprocess.run(given, cwd=ROOT, env=environment, capture_output=True)


@pytest.mark.slow
def test_nothing_of_a_run_and_its_record_holds_one(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """A real run and record, logged offline by W&B, against a server that repeats what it hears."""
    run = tmp_path / "run"
    given = SMALL | {"lm.name": tiny_lm_dir, "data.train": text_file, "run": run}
    fit = command("train.py", "fit", *(f"--{k}={v}" for k, v in given.items()), **KEYS)
    assert fit.returncode == 0, fit.stderr.decode()

    def echo(body: Body, _: int) -> Reply:
        heard = server.headers[-1]
        authorization = next(v for k, v in heard.items() if k.lower() == "authorization")
        said = " ".join([PASSWORD, TOKEN, authorization, server.queries[-1], *KEYS.values()])
        reply = json.loads(plain_judge(body))
        if "explanation" in reply:
            reply["explanation"] = said
        return Reply(body=completion(json.dumps(reply)) | {"model": said})

    with JudgeServer(misbehave=echo) as server:
        secret = f"me:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}"
        url = f"http://{secret}/v1?k={quote(TOKEN, safe='')}"
        record = command(
            "evaluate.py", "report", run, "--reports", "interpretability", "--text", text_file,
            "--documents", 200, "--interpretability.base_url", url,
            *[f"--interpretability.{k}" + f"={v}" for k, v in
              {"latents": 4, "controls": 2, "windows": 20, "width": 12}.items()],
            "--lm.untrained=true", **KEYS,
        )  # fmt: skip
    assert record.returncode == 0, record.stderr.decode()
    assert len(server.requests) > 4
    files = [path for path in run.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wandb" for path in files) == 2
    streams = [s for ran in (fit, record) for s in (ran.stdout, ran.stderr)]
    everything = b"".join([*streams, *(path.read_bytes() for path in files)])
    assert b"[secret]" in next((run / "eval").rglob("interpretability.csv")).read_bytes()
    wanted = {secret, url} | forms(PASSWORD) | forms(TOKEN) | forms(f"me:{PASSWORD}")
    for key in KEYS.values():
        wanted |= forms(key)
    for form in wanted:
        assert form.encode() not in everything, form


@pytest.mark.parametrize("typed", [
    "--lm.name={url} fit", "fit --lm.nam={url}", "fit --config={url}", "fit --model.tokens={url}",
    "fit --data.train={url}/*.txt", "{url}", "fit {url}", "fit --model.head={url}",
])  # fmt: skip
def test_what_is_refused_before_torch_is_loaded_shows_none(typed: str, capfd: Any) -> None:
    url = f"https://me:{quote(PASSWORD, safe='')}@127.0.0.1:1/x?token={quote(TOKEN, safe='')}"
    assert commands.train(typed.format(url=url).split()) == 2
    said = "".join(capfd.readouterr())
    assert "error: " in said
    for form in forms(PASSWORD) | forms(TOKEN):
        assert form not in said, form


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--lm.name", "--data.train", "--data.val", "--runs_dir"])
def test_an_address_in_a_wrong_place(
    option: str, tmp_path: Path, tiny_lm_dir: Path, forks: Forks
) -> None:
    url = f"https://me:{quote(PASSWORD, safe='')}@127.0.0.1:1/x?token={quote(TOKEN, safe='')}"
    given = {f"--{k}": str(v) for k, v in (SMALL | {"lm.name": tiny_lm_dir}).items()}
    given |= {"--data.train": str(tmp_path / "none.jsonl"), "--runs_dir": str(tmp_path / "runs")}
    given[option] = f"[{url}]" if option == "--data.val" else url
    ran = forks.start(
        ["train.py", "fit", *(f"{k}={v}" for k, v in given.items())], tmp_path / "log"
    )
    code = ran.wait()
    said = ran.said() + (tmp_path / "log.out").read_text()
    assert code == 2, said
    assert "Traceback" not in said
    for form in forms(PASSWORD) | forms(TOKEN):
        assert form not in said, form
