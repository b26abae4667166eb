"""`evaluate.py list`, and runs by name wherever one is asked for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kanllama_lightning.cli.evaluate_command import main as evaluate_main
from kanllama_lightning.cli.main import evaluate
from kanllama_lightning.cli.resume import find_checkpoint
from kanllama_lightning.runs.folder import CONFIG
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.types import InputError


def state_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about one run."""
    assert evaluate(["list", "--runs_dir", str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    first = next(i for i, line in enumerate(lines) if line.startswith(folder.name))
    rest = [i for i, line in enumerate(lines) if i > first and not line.startswith(" ")]
    return lines[first : rest[0] if rest else None]


def test_a_finished_run_with_its_figures(run_folder, capsys):
    summary = json.loads((run_folder / "summary.json").read_text())
    first, second = state_of(run_folder, capsys)
    assert "finished" in first
    cells = second.split()
    assert cells[:2] == ["BatchTopK", "blocks.1.hook_mlp_out"]
    figures = [summary[f"val/{name}"] for name in ("l0", "fvu", "delta_ce")]
    assert cells[2:5] == [f.format(v) for f, v in zip(("{:.1f}", "{:.4f}", "{:.5f}"), figures)]  # noqa: B905
    assert cells[5] == "2.56k"


def test_runs_that_are_not_finished(run_folder, capsys):
    (run_folder / "summary.json").unlink()
    shutil.rmtree(run_folder / "head")
    first, second = state_of(run_folder, capsys)
    assert "stopped, can go on" in first
    assert second.split() == ["BatchTopK", "model.layers.1.mlp", "2.56k"]
    shutil.rmtree(run_folder / "checkpoints")
    shutil.rmtree(run_folder / "eval", ignore_errors=True)
    assert "debris" in "".join(state_of(run_folder, capsys))
    empty = run_folder.parent / "nothing"
    empty.mkdir()
    assert "empty" in state_of(empty, capsys)[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", '{"heads": 3}'),
        ("head/head.json", "[]"),
        ("config.yaml", "a: ["),
        ("config.yaml", "model: {head: {init_args: null}, tokens: x}\nlm: 3"),
    ],
)
def test_what_cannot_be_read_is_named_in_its_row(file, text, run_folder, capsys):
    other = shutil.copytree(run_folder, run_folder.parent / "other")
    (run_folder / file).write_text(text)
    first, *rest = state_of(run_folder, capsys)
    assert "damaged" in first
    assert file.rpartition("/")[2] in "".join(line.strip() for line in rest)
    assert "finished" in state_of(other, capsys)[0]


def test_the_newest_comes_first_and_names_are_whole(run_folder, capsys):
    long = shutil.copytree(run_folder, run_folder.parent / ("a" * 70))
    for path in long.rglob("*"):
        os.utime(path, (1, 1))
    assert evaluate(["list", f"--runs_dir={run_folder.parent}"]) == 0
    out = capsys.readouterr().out
    assert out.index(run_folder.name) < out.index("a" * 70)
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["last"], "takes no RUN"),
        (["--runs_dir", "/no/such"], "--runs_dir='/no/such': no such folder"),
        (["--runs_dir"], "--runs_dir: its value is missing"),
        (["--runsdir", "x"], "Did you mean --runs_dir?"),
    ],
)
def test_mistakes(args, said, capsys):
    assert evaluate(["list", *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_torch_is_not_loaded(finished):
    code = (
        "import sys; from kanllama_lightning.cli.main import evaluate; "
        f"evaluate(['list', '--runs_dir', {str(finished.folder.parent)!r}]); "
        "import kanllama_lightning; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert finished.folder.name in done.stdout


def test_a_run_by_name_by_its_beginning_and_by_its_files(run_folder):
    runs = str(run_folder.parent)
    (checkpoint,) = (run_folder / "checkpoints").glob("*.ckpt")
    along = shutil.copytree(run_folder / "head", run_folder / "heads" / "tokens=1")
    alone = shutil.copytree(run_folder / "head", run_folder.parent.parent / "alone")
    for name, folder in {
        run_folder.name: run_folder,
        run_folder.name[:6]: run_folder,
        f"{runs}/{run_folder.name[:6]}": run_folder,
        "last": run_folder,
        "last/head": run_folder / "head",
        str(checkpoint): run_folder,
        str(run_folder / "checkpoints"): run_folder,
        str(run_folder / CONFIG): run_folder,
        str(run_folder / "head" / "head.safetensors"): run_folder,
        str(along / "head.safetensors"): along,
        str(alone / "head.json"): alone,
        str(alone): alone,
    }.items():
        assert folder_named(name, runs) == folder, name


def test_a_name_that_leads_nowhere(run_folder):
    runs = str(run_folder.parent)
    (run_folder.parent / f"{run_folder.name}-2").mkdir()
    for name, said in {
        run_folder.name[:4]: "2 runs in --runs_dir",
        "lst": r"no such folder, and no run of that name .* Did you mean last\?",
        run_folder.name[1:]: rf"Did you mean {run_folder.name}, {run_folder.name}-2\?",
        f"{run_folder.name}/kan": "holds no kan",
        str(Path(__file__)): "a file that is in no run",
    }.items():
        with pytest.raises(InputError, match=said):
            folder_named(name, runs)


def test_try_and_ckpt_path_take_names(run_folder, capsys):
    runs, begin = str(run_folder.parent), run_folder.name[:6]
    args = ["--runs_dir", runs, "--text", "w1 w2", "--n_new", "0"]
    assert evaluate_main(["try", begin, *args]) == 0
    assert (run_folder / "eval" / "try.html").is_file()
    assert evaluate_main(["try", "lst", *args]) == 2
    assert "Did you mean last?" in capsys.readouterr().err
    config = (run_folder / CONFIG).read_text()
    found = find_checkpoint(begin, runs, config, None, exact=False)
    assert found.parent.parent == run_folder
    with pytest.raises(InputError, match="ckpt_path='nothing': no such folder, and no run of that"):
        find_checkpoint("nothing", runs, config, None, exact=False)
