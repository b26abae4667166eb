"""Processes that something else starts: they find each other, or say who is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kanllama_lightning.cli.meeting import patience, started_with_others
from kanllama_lightning.types import InputError
from tests.conftest import SMALL
from tests.gloo import ROOT, free_port

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
MEET = """
import os, sys, time
from kanllama_lightning.cli.meeting import Meeting, Started, patience
from kanllama_lightning.types import InputError, RunFinished

def take_part(rank, world, port, how, file):
    try:
        met = Meeting(Started(rank, world, "127.0.0.1", port, rank == 0), patience())
        if how == "finished" and not rank:
            met.refuse(RunFinished("nothing is left to do"))
        elif how == "killed" and not rank:
            while not met.store.check(["kanllama_here_1"]):
                pass
            os._exit(1)
        elif rank:
            file.write(met.hear())
        else:
            met.tell("runs/of all")
    except (InputError, RunFinished) as e:
        file.write(f"{type(e).__name__} {e}")
    file.flush()
    while not rank and not os.path.exists(f"{folder}/done"):  # until all have heard it
        time.sleep(0.05)
    os._exit(0)

world, port, how, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
pids = {}
for rank in map(int, sys.argv[5:]):
    pid = os.fork()
    if not pid:
        take_part(rank, world, port, how, open(f"{folder}/{rank}", "w"))
    pids[rank] = pid
for rank in sorted(pids, reverse=True):
    if not rank:
        open(f"{folder}/done", "w").close()
    os.waitpid(pids[rank], 0)
"""


def said(
    folder: Path, ranks: list[int], world: int, how: str = "all", seconds: float = 60
) -> list[str]:
    """What each of some processes says in the end; the first of them ends last."""
    args = [str(one) for one in (world, free_port(), how, folder, *ranks)]
    environment = {**os.environ, "KANLLAMA_START_TIMEOUT": str(seconds)}
    command = [sys.executable, "-c", MEET, *args]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    return [(folder / str(rank)).read_text() for rank in ranks]


def test_all_hear_where_the_run_goes(tmp_path: Path) -> None:
    assert said(tmp_path, [0, 1, 2], 3) == ["", "runs/of all", "runs/of all"]


def test_who_is_missing_is_said_by_all(tmp_path: Path) -> None:
    first, second = said(tmp_path, [0, 1], 4, seconds=3)
    assert "of 4 processes, counted from 0, these did not come" in first
    assert "within 3 s (KANLLAMA_START_TIMEOUT): 2, 3;" in first
    assert second.startswith("InputError the first process has ended: of 4 processes")


@pytest.mark.slow
def test_the_first_is_missing_or_killed_or_has_nothing_to_do(tmp_path: Path) -> None:
    (alone,) = said(tmp_path, [1], 2, seconds=3)
    assert alone.startswith("InputError process 1 of 2 found nobody at 127.0.0.1:")
    assert said(tmp_path, [0, 1], 2, "finished")[1] == "RunFinished nothing is left to do"
    assert "has ended; look into its output" in said(tmp_path, [0, 1], 2, "killed")[1]


def test_ways_of_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    assert started_with_others(1) is None
    with pytest.raises(InputError, match="num_nodes=2: NODE_RANK, MASTER_ADDR, MASTER_PORT"):
        started_with_others(2)
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "7")):
        monkeypatch.setenv(name, value)
    assert started_with_others(2) == (1, 2, "a", 7, False)
    monkeypatch.setenv("LOCAL_RANK", "1")  # what Lightning starts on that node is told by it
    assert started_with_others(2) is None
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="mpirun: .*start with torchrun or srun"):
        started_with_others(1)
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("KANLLAMA_START_TIMEOUT", wrong)
        with pytest.raises(InputError, match=f"KANLLAMA_START_TIMEOUT='{wrong}'"):
            patience()


# ------------------------------------------------------------------ the command itself


def arguments(lm: Path, text: Path, runs: Path) -> list[str]:
    given = SMALL | {
        "lm.name": lm, "data.train": text, "runs_dir": runs, "trainer.logger": "false",
        "trainer.devices": "2", "model.tokens": "640",
    }  # fmt: skip
    return ["fit", f"--config={ROOT / 'configs' / 'multi_gpu.yaml'}"] + [
        f"--{name}={value}" for name, value in given.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_folder_is_agreed_on(
    launcher: str, tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """One run, and none is named; srun is stood in for by the variables that it sets."""
    args = ["train.py", *arguments(tiny_lm_dir, text_file, tmp_path)]
    plain = {k: v for k, v in os.environ.items() if k not in OURS} | {"OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        how = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        started = [
            subprocess.Popen([*how, f"--master_port={free_port()}", *args], cwd=ROOT, env=plain)
        ]
    else:
        common = {
            "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0",
            "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        started = [
            subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                env=plain | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank in range(2)
        ]
    assert [one.wait(300) for one in started] == [0] * len(started)
    (run,) = tmp_path.iterdir()
    assert (run / "summary.json").is_file()


@pytest.mark.slow
def test_a_missing_process_ends_the_command(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two of three come: both say so, and no folder is left."""
    args = arguments(tiny_lm_dir, text_file, tmp_path)
    common = {
        "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test", "KANLLAMA_START_TIMEOUT": "20",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "train.py",
                *args,
                "--trainer.devices=3",
                "--model.sae_batch_tokens=63",
            ],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [one.communicate(timeout=240)[1] for one in started]
    assert [one.returncode for one in started] == [2, 2]
    assert all("these did not come to 127.0.0.1:" in error for error in errors)
    assert not list(tmp_path.iterdir())
