"""Heads in SAELens, sparsify and dictionary_learning themselves, and their SAEs here.

    .venv/bin/python benchmarks/exchange_parity.py [--tokens 5000] [--record FOLDER] [--keep FOLDER]

Makes the peers' environment (`benchmarks/peers.py`), trains every kind of head briefly and side by
side on the embedded model (and on stories260K where it lies in `../shared/data`), and transcoders
of the same MLP, and exports them. The peers load each folder (`exchange_there.py`, in their own
interpreter) and compute latents and reconstructions of held-out activations, a tenth of them
extreme; of a linear head, a KAN head and transcoders SAELens computes its own evaluation too. The
other way about, SAEs of the peers' classes, and SAEs that the peers' trainers made of the embedded
model's activations, are read here and compared with what their own code makes of them.

Prints a line for each; exit code 1 if latents or reconstructions differ by more than 1e-5, a latent
flips that is not a matter of rounding, a head through the plug-in is not bit-equal, L0 or FVU
differ by 2e-5, or the loss by 1e-4 nats at a token on average or by 5e-4 in more than one row in
ten (an activation at its threshold, which rounding decides, changes what comes after it).
`--record` writes the small folders that `tests/exchange/` compares with; `--keep` leaves everything
else in a folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STORIES = ROOT.parent / "shared" / "data"
HEADS = ("Standard", "Gated", "JumpReLU", "TopK", "BatchTopK", "Matryoshka", "WideBatchTopK",
         "FrozenDecoder", "FrozenEncoder", "SoftlyFrozenDecoder", "KANEncoder", "KANDirect",
         "SplineHidden", "SplineInput", "SplineLatent", "CurvedDictionary", "OnlyKAN",
         "KANReLUDense", "MLPEncoder")  # fmt: skip
TRANSCODERS = ("Standard", "JumpReLU", "TopK", "BatchTopK", "KANEncoder")
EVALUATED = ("batchtopk", "kanencoder", "batchtopk_skip")
"""Of which SAELens makes its own evaluation."""
D_SAE, L0, ROWS = 256, 8, 24


def texts() -> dict[str, list[str]]:
    """What to train on: options of `train.py`, by name."""
    found = {"embedded": ["--config", "configs/embedded.yaml"]}
    lm, text = STORIES / "stories260K-hf", STORIES / "tinystories_sample.jsonl"
    if lm.is_dir() and text.is_file():
        found["stories260K"] = [
            *("--config", "configs/embedded.yaml", "--lm.name", str(lm)),
            *("--lm.hook_point", "model.layers.2.mlp", "--data.train", str(text)),
            *("--data.val", "null", "--data.val_fraction", "0.1", "--data.ctx_len", "256"),
        ]
    read = ["--lm.input_point", "mlp_in"]
    return found | {f"{name}_transcoder": [*given, *read] for name, given in found.items()}


def heads_of(text: str) -> dict[str, dict[str, Any]]:
    """What to train side by side, by name."""
    size: dict[str, Any] = {"d_sae": D_SAE, "target_l0": L0}
    if not text.endswith("_transcoder"):
        return {one.lower(): {"class_path": one, "init_args": size} for one in HEADS}
    plain = {one.lower(): {"class_path": one, "init_args": size} for one in TRANSCODERS}
    return plain | {
        f"{one.lower()}_skip": {"class_path": one, "init_args": size | {"skip": True}}
        for one in TRANSCODERS
    }


def trained(name: str, options: list[str], work: Path) -> Path:
    """A run of all heads side by side; its folder."""
    config = work / f"{name}.yaml"
    head = {"class_path": "SideBySide", "init_args": {"heads": heads_of(name)}}
    config.write_text(json.dumps({"model": {"head": head}}))
    run = work / name
    command = [sys.executable, "train.py", "fit", "--config", str(config), *options,
               "--model.tokens", "30000", "--model.start_tokens", "4096",
               "--data.val_tokens", "4096", "--trainer.logger", "false",
               "--run", str(run)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: training failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return run


def exported(run: Path, work: Path, tokens: int) -> Any:
    """Export every head of a run in every format that takes it, and say which do not.

    Returns:
        The LM, loaded.
    """
    from kanllama_lightning.cli.export_command import origin_of
    from kanllama_lightning.exchange.agreement import with_extremes
    from kanllama_lightning.exchange.formats import FORMATS
    from kanllama_lightning.reports.saved_head import read_subject
    from kanllama_lightning.runs.folder import HEAD, members
    from kanllama_lightning.types import InputError

    lm = put_tokens(run, members(run)[0], tokens)
    x = with_extremes(load_file(run / "plain.safetensors")["x"][:tokens])
    save_file({"x": x}, run / "x.safetensors")
    for member in members(run):
        subject = read_subject(member)
        place = work / "out" / run.name / member.name
        for name, kind in FORMATS.items():
            try:
                kind.write(subject.head, origin_of(subject), place / name)
            except InputError as e:
                sys.stdout.write(f"refused {run.name} {e}\n")
                continue
            (place / "head").unlink(missing_ok=True)
            (place / "head").symlink_to((member / HEAD).resolve())
        if member.name in EVALUATED and (place / "saelens").is_dir():
            figures, losses = own_figures(subject.head, lm, run, subject.head.transcoder)
            (place / "figures.json").write_text(json.dumps(figures))
            save_file(losses, place / "losses.safetensors")
    return lm


def put_tokens(run: Path, member: Path, tokens: int) -> Any:
    """Write held-out tokens and their activations for the peers; returns the LM, loaded."""
    from kanllama_lightning.functional.losses import next_token_targets
    from kanllama_lightning.reports.evaluation import EvalSettings, first_activations, token_rows
    from kanllama_lightning.reports.saved_head import read_subject, shared_lm
    from kanllama_lightning.reports.token_sets import batches

    subject = read_subject(member)
    lm = shared_lm([subject], {}, "float32")
    lm.load_(torch.device("cpu"))
    rows = next(iter(token_rows(subject, lm, EvalSettings()).values()))
    x = first_activations(lm, rows, ROWS, max(tokens, 20_000))
    save_file({"x": x}, run / "plain.safetensors")
    batch = next(batches(rows, ROWS))
    _, counts = next_token_targets(batch.ids, batch.keep, batch.doc)
    row, pos = counts.nonzero(as_tuple=True)
    seen = {"ids": batch.ids, "keep": batch.keep.long(), "doc": batch.doc, "row": row, "pos": pos}
    save_file({k: v.contiguous() for k, v in seen.items()}, run / "tokens.safetensors")
    (run / "lm.txt").write_text(str(Path(lm.path).absolute()))
    return lm


@torch.no_grad()
def own_figures(
    head: Any, lm: Any, run: Path, everywhere: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Our figures of a head on a run's tokens, sinks included, as the peers know of none.

    Args:
        head: Ours, or read from a peer's folder.
        lm: Loaded.
        run: The folder with the tokens.
        everywhere: Whether special tokens are replaced too, as SAELens does with a transcoder.
    """
    from kanllama_lightning.lm.splice import put, spliced_losses
    from kanllama_lightning.measures.head_batch import run_head
    from kanllama_lightning.types import TokenBatch

    seen = load_file(run / "tokens.safetensors")
    keep = seen["keep"].bool()
    tokens = TokenBatch(seen["ids"], keep, seen["doc"], torch.zeros(3, dtype=torch.int64))
    prefix, no_limit = lm.prefix(tokens.ids), torch.tensor(torch.inf)
    spots = tokens._replace(keep=torch.ones_like(keep)) if everywhere else tokens
    batch = run_head(prefix, spots, "val", head, no_limit)
    runs = {"recon": put(prefix.acts, batch.mask, batch.out.x_hat),
            "zero": put(prefix.acts, batch.mask, torch.zeros_like(batch.x))}  # fmt: skip
    losses = spliced_losses(lm, prefix, tokens, runs)
    counted = run_head(prefix, tokens, "val", head, no_limit)
    figures = on_rows(head, counted.rows)
    found = {f"ce_{name}": value for name, value in losses.ce.items()} | {"row": losses.where[0]}
    return figures, {name: value.contiguous() for name, value in found.items()}


@torch.no_grad()
def on_rows(head: Any, rows: Tensor) -> dict[str, float]:
    """L0 and the parts of variance, in the peers' words, over activations."""
    out = head.eval()(rows)
    x, left = head.target(rows).double(), (head.target(rows) - out.x_hat).double()
    fvu = float(left.square().sum() / (x - x.mean(0)).square().sum())
    return {
        "l0": float(out.codes.l0().double().mean()),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        # dictionary_learning leaves out what the mean of the error is
        "frac_variance_explained": 1 - float(left.var(0).sum() / x.var(0).sum()),
    }


@contextmanager
def a_hub(work: Path) -> Iterator[dict[str, str]]:
    """A hub of this machine with `PUBLISHED` in it; the environment in which it is the hub."""
    from exchange_there import PUBLISHED

    from tests.hub_server import TOKEN, Hub

    hub = Hub()
    try:
        env = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN,
                            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "hub")}  # fmt: skip
        for name in PUBLISHED:
            command = [sys.executable, "evaluate.py", "publish", str(work / "embedded" / name)]
            done = subprocess.run([*command, f"me/{name}"], cwd=ROOT, env=env, capture_output=True,
                                  text=True, check=False)  # fmt: skip
            if done.returncode:
                raise SystemExit(f"publishing {name} failed:\n{done.stdout}{done.stderr}")
        yield env
    finally:
        hub.close()


def read_here(work: Path, lms: dict[str, Any]) -> int:
    """Read what the peers' trainers made, and compare figures; how many differ."""
    from exchange_there import FIGURES, LOSSES, same

    from kanllama_lightning.exchange.formats import read_foreign

    wrong = 0
    for path in sorted((work / "trained").rglob(FIGURES)):
        head, _ = read_foreign(path.parent)
        kind = "embedded_transcoder" if head.transcoder else "embedded"
        theirs, losses = json.loads(path.read_text()), load_file(path.parent / LOSSES)
        ours: dict[str, Tensor] = {}
        if losses:
            figures, ours = own_figures(head, lms[kind], work / kind)
        else:
            figures = on_rows(head, load_file(work / kind / "plain.safetensors")["x"])
        name = path.parent.relative_to(work / "trained")
        wrong += not same(f"{name}, trained there and read here", figures, theirs, ours, losses)
    return wrong


@contextmanager
def folder_for(kept: Path | None) -> Iterator[Path]:
    """A folder to work in, which goes afterwards unless it is to be kept."""
    if kept is not None:
        if kept.exists() and any(kept.iterdir()):
            raise SystemExit(f"--keep {kept}: is not empty; name a new folder")
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> int:
    """Run both halves; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    from peers import ensure

    peers = ensure()
    sys.stdout.write(f"{json.dumps(peers.versions)}\n")
    if peers.python is None or len(peers.versions) < 4:
        sys.stderr.write(f"peers are missing: {'; '.join(peers.notes)}\n")
        return 1
    with folder_for(given.keep) as work:
        lms = {
            text: exported(trained(text, options, work), work, given.tokens)
            for text, options in texts().items()
        }
        sys.stdout.flush()
        command = [peers.python, str(Path(__file__).with_name("exchange_there.py")), str(work)]
        command += ["--record", str(given.record)] if given.record else []
        with a_hub(work) as env:
            failed = subprocess.run(command, env=env, check=False).returncode
        return 1 if read_here(work, lms) or failed else 0


if __name__ == "__main__":
    sys.exit(main())
