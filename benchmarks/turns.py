"""Which of two commands is faster, on a machine whose speed wanders: they take turns.

    git worktree add /tmp/before COMMIT
    .venv/bin/python benchmarks/turns.py --cwd /tmp/before --cwd . -- env PYTHONPATH=. \\
        $PWD/.venv/bin/python train.py fit --config topk embedded --model.tokens 300000

The command is begun in both folders at once, and only one of the two runs at any time: the other is
stopped (SIGSTOP, with all its children) for as long. So both see the same minutes of the machine,
and what else it does falls on both alike. Given are the seconds that each ran until it ended, and
their ratio, second over first, for each round; in every second round the second begins. What they
print goes to a file each (`--keep`). A command that keeps time itself sees its stops: take medians
of what is short beside a turn.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TURN_S = 0.5


class Running:
    """A command in a process group of its own, stopped at first.

    Args:
        command: With its arguments.
        cwd: Where it runs.
        output: What it prints.
    """

    def __init__(self, command: Sequence[str], cwd: Path, output: Path) -> None:
        self.seconds = 0.0
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.send(signal.SIGSTOP)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        """A signal to it and its children."""
        if not self.ended:
            os.killpg(self.process.pid, number)

    def turn(self, seconds: float) -> None:
        """Let it run for a while, or to its end."""
        began = time.perf_counter()
        self.send(signal.SIGCONT)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGSTOP)
        self.seconds += time.perf_counter() - began


def round_of(
    commands: Sequence[tuple[Sequence[str], Path]], outputs: Sequence[Path], turn: float
) -> list[float]:
    """Seconds that each command ran, in the order given.

    Raises:
        RuntimeError: One cannot be begun, or ended with another exit code than 0.
    """
    both: list[Running] = []
    try:
        for (command, cwd), output in zip(commands, outputs, strict=True):
            try:
                both.append(Running(command, cwd, output))
            except OSError as e:
                raise RuntimeError(f"in {cwd}: {command[0]} cannot be begun: {e.strerror}") from e
        while not all(one.ended for one in both):
            for one in both:
                if not one.ended:
                    one.turn(turn)
        for one, (_, cwd), out in zip(both, commands, outputs, strict=True):
            if one.process.returncode:
                said = out.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"in {cwd}: exit code {one.process.returncode}; it said\n{said}")
    finally:
        for one in both:
            one.send(signal.SIGKILL)
            one.process.wait()
    return [one.seconds for one in both]


def compare(
    command: Sequence[str], folders: Sequence[Path], rounds: int, turn: float, keep: Path
) -> dict[str, object]:
    """Both in turns, so many rounds."""
    keep.mkdir(parents=True, exist_ok=True)
    ratios, seconds = [], []
    for number in range(rounds):
        order = [0, 1] if number % 2 == 0 else [1, 0]
        outputs = [keep / f"{number}-{'ab'[i]}.txt" for i in order]
        found = round_of([(command, folders[i]) for i in order], outputs, turn)
        first, second = (found[order.index(i)] for i in (0, 1))
        seconds.append([round(first, 2), round(second, 2)])
        ratios.append(round(second / first, 4))
        sys.stderr.write(f"round {number + 1}: {first:.1f} s, {second:.1f} s\n")
    return {
        "command": list(command),
        "folders": [str(folder) for folder in folders],
        "seconds": seconds,
        "second_over_first": ratios,
        "median": statistics.median(ratios),
    }


def main(args: Sequence[str] | None = None) -> int:
    """Compare one command in two folders; JSON on the terminal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--cwd", type=Path, action="append", required=True, help="a folder; twice, first and second"
    )
    add("--rounds", type=int, default=3, help="how often")
    add("--turn", type=float, default=TURN_S, help="seconds that one runs before the other does")
    add("--keep", type=Path, help="folder for what they print")
    add("command", nargs="+", help="behind --")
    given = parser.parse_args(args)
    if len(given.cwd) != 2:
        parser.error(f"--cwd: give it twice, not {len(given.cwd)} times")
    if given.rounds < 1 or not given.turn > 0:
        parser.error(f"--rounds {given.rounds}, --turn {given.turn}: must be above 0")
    with tempfile.TemporaryDirectory() as folder:
        keep = given.keep or Path(folder)
        try:
            found = compare(given.command, given.cwd, given.rounds, given.turn, keep)
        except (RuntimeError, KeyboardInterrupt) as e:
            sys.stderr.write(f"error: {e}\n" if str(e) else "stopped\n")
            return 2 if str(e) else 130
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
