"""A record of judged latents that is killed again and again, and goes on each time."""

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.hold import Fork, Forks
from tests.judge_server import Body, JudgeServer, is_explain, n_windows, wait_until

KILLS, CONCURRENCY = 10, 4


def judge(body: Body) -> str:
    text = body["messages"][1]["content"]
    if is_explain(body):
        number = sum(map(ord, text))
        answer = {"category": "low_level", "score": number % 5 + 1}
        return json.dumps(answer | {"explanation": f"window text number {number}"})
    return json.dumps({"labels": [(len(text) + i) % 2 for i in range(n_windows(body))]})


def start(forks: Forks, run: Path, text: Path, url: str) -> Fork:
    args = [
        "evaluate.py",
        "report",
        run,
        "--reports",
        "interpretability",
        "--wandb",
        "false",
        "--text",
        text,
    ]
    args += ["--documents", 120, "--device", "cpu"]
    given = {"latents": 16, "controls": 6, "windows": 20, "width": 12, "base_url": url}
    given |= {"concurrency": CONCURRENCY}
    args += [f"--interpretability.{k}={v}" for k, v in given.items()]
    return forks.start(args, run.parent / "log")


@pytest.mark.slow
def test_killed_ten_times(runs: Path, text_file: Path, forks: Forks) -> None:
    """No reply that the client has surely read is asked for twice, and the table is the same.

    Surely read: another request came on its connection afterwards, for the client's loop writes a
    reply to the disk in the very step in which it is complete. A reply that reached the machine in
    the instant of the kill may be lost: no more than one for each call in flight.
    """
    draw = random.Random(time.time_ns())
    other = runs / "seed0_undisturbed"
    shutil.copytree(runs / "seed0", other)
    with JudgeServer(judge, delay=0.1) as server:
        assert start(forks, other, text_file, server.url).wait() == 0
        calls = len(server.requests)
        assert max(server.asked.values()) == 1
        assert calls > KILLS * CONCURRENCY
    run = runs / "seed0"
    with JudgeServer(judge, delay=0.1) as server:
        for kill in range(KILLS):
            process = start(forks, run, text_file, server.url)
            before = len(server.requests)
            if kill == 5:  # while it reads the text
                time.sleep(draw.uniform(0, 1))
            else:
                wanted = before + draw.randint(1, calls // (KILLS + 2))
                reached = partial(lambda n: len(server.requests) >= n, wanted)
                assert wait_until(reached, 120), (process.said(), wanted, calls)
                time.sleep(draw.uniform(0, 0.12))
            assert process.running(), process.said()
            process.kill(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            on_disk = [p for p in (run / "eval").glob("*/judge/*.json") if len(p.stem) == 64]
            assert len(server.read) <= len(on_disk)
        assert start(forks, run, text_file, server.url).wait() == 0
        assert not +server.again
        assert len(server.asked) == calls
        assert calls < sum(server.asked.values()) <= calls + KILLS * CONCURRENCY
    mine, theirs = (next((r / "eval").glob("*/interpretability.csv")) for r in (run, other))
    assert mine.read_bytes() == theirs.read_bytes()
    for path in (run / "eval").glob("*/judge/*.json"):
        json.loads(path.read_text())
