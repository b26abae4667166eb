"""A random two-block Llama, a word tokenizer and a little text, all made here; no network."""

import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tests.shapes  # comes before what it is to check
from kanllama_lightning.data.packing import join, pack
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.types import TokenBatch
from tests.fuzz.harness import COUNTS
from tests.hold import Forks

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB = 64
BOS, EOS = 0, 1
WORDS = [f"w{i}" for i in range(VOCAB - 3)]
CTX = 32
"""Length of a row in `SMALL`."""
Fit = Callable[..., int]

SMALL = {
    "lm.revision": "null",
    "lm.dtype": "float32",
    "lm.hook_point": "model.layers.1.mlp",
    "lm.untrained": "true",
    "model.head": "BatchTopK",
    "model.head.d_sae": "32",
    "model.head.target_l0": "4",
    "model.tokens": "2560",
    "model.sae_batch_tokens": "64",
    "model.start_tokens": "256",
    "model.buffer.capacity_tokens": "512",
    "model.optimizer.lr": "0.01",
    "model.buffer.dtype": "float32",
    "data.val": "null",
    "data.ctx_len": "32",
    "data.lm_batch_seqs": "4",
    "data.val_tokens": "512",
    "trainer.val_check_interval": "10",
    "trainer.log_every_n_steps": "5",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
}


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    """In every test the first calls of a function are checked against its annotations."""
    tests.shapes.next_test()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only addresses on this machine may be connected to."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(address, tuple) and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the network is off in tests: {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("WANDB_MODE", "offline")
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def _no_idle_work() -> Iterator[None]:
    """Files are not waited for, as only a loss of power would show; W&B lists no packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")
        yield


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<bos>": BOS, "<eos>": EOS, "<unk>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: 3 blocks, width 16, vocabulary 64."""
    folder = tmp_path_factory.mktemp("tiny_lm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=BOS,
            eos_token_id=EOS,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_lm(tiny_lm_dir: Path) -> Callable[..., FrozenLM]:
    """Builds and loads the tiny LM at a hook point."""

    def make(hook_point: str = "model.layers.1.mlp", **kwargs: Any) -> FrozenLM:
        return FrozenLM(str(tiny_lm_dir), hook_point, untrained=True, **kwargs).load_()

    return make


@pytest.fixture
def tokens() -> TokenBatch:
    """Five packed rows of 12 with document ends inside, and one that ends in padding."""
    rng = random.Random(1)
    docs = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (4, 7, 15, 1, 3, 20, 2, 6)]
    short = pack([docs[0]], [9], 12, BOS, EOS, (BOS, EOS))
    full = pack(docs, range(len(docs)), 12, BOS, EOS, (BOS, EOS))
    return TokenBatch(*join([full, short]), torch.zeros(3, dtype=torch.int64))


@pytest.fixture(scope="session")
def whole_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that fill exactly one row each, so that all rows count equally many tokens."""
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(1200):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=CTX - 1))}) + "\n")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of random words as jsonl."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            words = rng.choices(WORDS, k=rng.randint(10, 60))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture
def fit(tiny_lm_dir: Path, text_file: Path, tmp_path: Path) -> Fit:
    """Runs `fit` on the tiny model; arguments by name, None leaves one out; `extra` go last."""

    from train import main

    def run(*extra: str, **changed: Any) -> int:
        given = SMALL | {"lm.name": str(tiny_lm_dir), "data.train": str(text_file)}
        given |= {"runs_dir": str(tmp_path / "runs")}
        given |= {k.replace("__", "."): v for k, v in changed.items()}
        args = [f"--{k}={v}" for k, v in given.items() if v is not None]
        return main(["fit", *args, *extra])

    return run


def rest_slow(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which only those in `fast` are tried in the default suite."""
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


ALONE = {"model.head": None, "model.head.d_sae": None, "model.head.target_l0": None}
"""What SMALL says of a head, left out: a config of heads side by side says it."""


def side_by_side_config(folder: Path, heads: Any, **more: Any) -> str:
    """The argument that names a config with these heads side by side.

    `d_sae`, `target_l0` are those of the heads that do not say their own; `trainer` goes beside.
    """
    args = {"d_sae": 32, "target_l0": 4, **more, "heads": heads}
    trainer = args.pop("trainer", {})
    head = {"class_path": "SideBySide", "init_args": args}
    tree = {"model": {"head": head}, "trainer": trainer}
    path = folder / "heads.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return f"--config={path}"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class IdleTrainer(L.Trainer):
    """A trainer that runs nothing: what callbacks look at can be set."""

    global_step = 0

    def __init__(self) -> None:
        self.state = TrainerState(fn=TrainerFn.FITTING)


def terminate_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let runs of this process get SIGTERM in these steps, one after the other."""
    from kanllama_lightning.training.module import SAEModule

    original, stops = SAEModule.on_before_optimizer_step, list(steps)

    def stop_now(self: SAEModule, optimizer: torch.optim.Optimizer) -> None:
        if stops and self.trainer.global_step == stops[0] - 1:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, optimizer)

    monkeypatch.setattr(SAEModule, "on_before_optimizer_step", stop_now)


def only_run(tmp_path: Path) -> Path:
    """The one run folder that `fit` left."""
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def fit_for_many(given: Mapping[str, Any], *extra: str) -> None:
    """Runs `fit` where no test has begun, and so nothing has turned W&B's network off."""
    from train import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert main(["fit", *extra, *[f"--{k}={v}" for k, v in given.items()]]) == 0


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs commands in real processes that need not import anything."""
    with Forks() as running:
        yield running


class Finished(NamedTuple):
    """A finished run that many tests look at."""

    folder: Path
    printed: str


@pytest.fixture(scope="session")
def finished(
    tiny_lm_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A finished run on the tiny model, made once; not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    given = SMALL | {"lm.name": tiny_lm_dir, "data.train": text_file, "runs_dir": runs}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit_for_many(given)
    (folder,) = runs.iterdir()
    return Finished(folder, printed.getvalue())


@pytest.fixture
def run_folder(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    folder = tmp_path / "runs" / finished.folder.name
    shutil.copytree(finished.folder, folder, symlinks=True)
    return folder


LONGEST = (
    "test_llama_1b_shapes_fit_on_a_cpu",
    "test_llama_1b_in_blocks",
    "test_killed_at_named_and_random_points",
    "test_a_judge_that_knows_the_facts",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, so that no process waits for another one at the end."""
    items.sort(key=lambda item: getattr(item, "originalname", item.name) not in LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the counts of damaged files on, where tests run in several processes."""
    if hasattr(session.config, "workeroutput"):
        counted = {name: dict(counts) for name, counts in COUNTS.items()}
        session.config.workeroutput["fuzz"] = counted


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up what one of the processes counted."""
    for name, counts in getattr(node, "workeroutput", {}).get("fuzz", {}).items():
        COUNTS.setdefault(name, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say at the end how damaged files of every kind ended."""
    if not COUNTS:
        return
    terminalreporter.write_sep("-", "fuzz: cases by area and how they ended")
    for name, counts in COUNTS.items():
        said = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
        terminalreporter.write_line(f"{name:24} {counts.total():5}: {said}")
    total = sum(counts.total() for counts in COUNTS.values())
    terminalreporter.write_line(f"{'all':24} {total:5}")
