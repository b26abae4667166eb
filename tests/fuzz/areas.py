"""The areas: real files of every kind in a folder, and the real functions that read them."""

import csv
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load, save

from kanllama_lightning import comparison, prompts
from kanllama_lightning.cli.resume import find_checkpoint
from kanllama_lightning.corpus import LocalCorpus
from kanllama_lightning.data.shards import ActivationCache, ShardPlace
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.exchange import dictionary_learning, saelens, sparsify
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads import BatchTopK, Gated, JumpReLU, KANEncoder, SAEHead, TopK
from kanllama_lightning.judge import replies
from kanllama_lightning.judge.client import _answer, _envelope, _judged
from kanllama_lightning.judge.protocol import parse_explanation, parse_labels
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.reports.labels import CONCEPTS, SCORES, read_labels
from kanllama_lightning.reports.one_pass import read_done
from kanllama_lightning.reports.saved_head import read_subject
from kanllama_lightning.runs.checkpoints import seal
from kanllama_lightning.runs.folder import Table
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.runs.seals import written
from kanllama_lightning.storage.small_files import read_csv
from kanllama_lightning.training.drought import Drought
from tests.fuzz.damage import Edit, broken, damaged_json, edited
from tests.fuzz.harness import Area, Silent
from tests.test_comparison import record

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def finite(value: Any, where: str = "it") -> None:
    """Nothing in here is a number that is none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Silent(f"{where} is {value}")
    if isinstance(value, torch.Tensor) and not value.isfinite().all():
        raise Silent(f"{where} is not finite")
    if isinstance(value, dict):
        for key, one in value.items():
            finite(one, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            finite(one, f"{where}[{i}]")


# --------------------------------------------------------------------------------- saved heads


def weights(data: bytes, changes: list[Edit]) -> bytes:
    """A file of tensors after edits of them, or of its bytes."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    return save({k: v.contiguous() for k, v in changed_tensors(load(data), changes).items()})


def torch_weights(data: bytes, changes: list[Edit]) -> bytes:
    """The same of a file of `torch.save`; some of them would run code, or fill the memory."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    held = torch.load(io.BytesIO(data), weights_only=True)
    state: Any = changed_tensors(held, changes)
    odd: list[Any] = [_Evil(), torch.zeros(1).expand(10**12), torch.zeros(2, 2).to_sparse(), "a", 3]
    if changes[0].what % 4 == 0:
        state |= {sorted(held)[changes[0].where % len(held)]: odd[changes[0].much % len(odd)]}
    if changes[0].what % 17 == 0:
        state = odd[changes[0].much % len(odd)]
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=changes[0].what % 11 != 0)
    return out.getvalue()


def changed_tensors(state: dict[str, Any], changes: list[Edit]) -> dict[str, Any]:
    """Tensors of other formats, values, shapes and names."""
    state = dict(state)
    for change in changes:
        name = sorted(state)[change.where % len(state)]
        old = state[name]
        kinds = (torch.int8, torch.bool, torch.complex64, torch.float16, torch.float64)
        values = (math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, 1e-38, 1e30)
        if change.how < 2:
            state[name] = old.to(kinds[change.what % len(kinds)])
        elif change.how < 5:
            state[name] = torch.full_like(old, values[change.what % len(values)])
        elif change.how < 7:
            flat = old.clone().reshape(-1)
            if len(flat):
                flat[change.much % len(flat)] = values[change.what % len(values)]
            state[name] = flat.reshape(old.shape)
        elif change.how < 9:
            state[name] = old.reshape(-1)[: max(1, old.numel() // 2)].clone()
        elif change.how == 9:
            del state[name]
        else:
            state[f"more{change.what}"] = torch.ones(change.much % 5)
    return state


def heads(folder: Path) -> list[Area]:
    """Cards and weights of three heads that were started on data."""
    saved = []
    for kind in (BatchTopK, KANEncoder, JumpReLU):
        head = kind(d_model=8, d_sae=16, target_l0=3).train()
        head.start_(X)
        head.calibrate_(X)
        head.norm_limit.fill_(50.0)
        saved.append(folder / kind.__name__)
        head.save(saved[-1], {"lm": "tiny", "hook_point": "model.layers.0", "tokens": 10})

    def load_(where: Path) -> Callable[[], None]:
        return lambda: finite(SAEHead.load(where)(X).x_hat, "reconstruction")

    areas = []
    for own in saved:
        areas += [
            Area(f"head.json of {own.name}", [own / "head.json"], damaged_json, load_(own)),
            Area(f"weights of {own.name}", [own / "head.safetensors"], weights, load_(own)),
        ]
    return areas


def foreign(folder: Path) -> list[Area]:
    """Folders of SAELens, sparsify and dictionary_learning."""
    areas = []
    for kind, head in ((saelens, JumpReLU), (saelens, KANEncoder), (sparsify, TopK),
                       (dictionary_learning, Gated)):  # fmt: skip
        own = folder / f"{kind.NAME}-{head.__name__}"
        made = head(d_model=8, d_sae=16, target_l0=3)
        made.start_(X)
        made.calibrate_(X)
        kind.write(made.eval(), Origin(lm="tiny", hook_point="model.layers.0", l0=3.0), own)
        config, tensors = (own / name for name in kind.FILES[:2])

        def read(own: Path = own) -> None:
            subject = read_subject(own)
            finite(subject.head(X).x_hat, "reconstruction")
            finite(subject.head.encode(X), "latents")
            subject.lm_args()

        torn = torch_weights if tensors.suffix == ".pt" else weights
        areas += [
            Area(f"config of {own.name}", [config], damaged_json, read),
            Area(f"weights of {own.name}", [tensors], torn, read),
        ]
    return areas


# -------------------------------------------------------------------------------- runs and records


CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "lm": {"name": "tiny", "hook_point": "model.layers.0", "revision": None, "untrained": False},
    "model": {"tokens": 1000, "head": {"class_path": "BatchTopK", "init_args": {"d_sae": 16}}},
    "data": {
        "train": {"class_path": "LocalCorpus", "init_args": {"path": "text.jsonl"}},
        "val": None,
        "val_fraction": 0.5,
        "val_tokens": 64,
        "ctx_len": 16,
    },
    "trainer": {"logger": False},
}
CHECKPOINT = {
    "state_dict": {"w": torch.ones(3)},
    "optimizer_states": [{"step": 1}],
    "loops": {"fit_loop": {}},
    "global_step": 10,
    "epoch": 0,
}


def run_folder(folder: Path) -> Path:
    """A run with two sealed checkpoints, a summary and a head."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for step in (10, 20):
        path = folder / "checkpoints" / f"step={step:09d}.ckpt"
        torch.save(CHECKPOINT, path)
        side = path.with_name(f"{path.stem}.rank0.safetensors")
        side.write_bytes(save({"rows": torch.ones(2)}))
        seal(path, [written(side), written(path)])
    summary = {"finished": False, "steps": 20, "tokens": 1000, "seconds": 1.5, "val/fvu": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    for step in (5, 10, 20):
        table(folder).put(step, [{"step": step, "set": "heldout", "l0": 0.5}])
    return folder


def table(folder: Path) -> Table:
    return Table(folder / "l0.csv", ["step", "set", "l0"])


def tabled(data: bytes, changes: list[Edit]) -> bytes:
    """A CSV file after edits of its cells, or of its bytes."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    rows = edited(list(csv.reader(io.StringIO(data.decode(), newline=""))), changes)
    out = io.StringIO(newline="")
    for row in rows if isinstance(rows, list) else [rows]:
        cells = row if isinstance(row, list) else [row]
        out.write(",".join('"' + str(c).replace('"', '""') + '"' for c in cells) + "\r\n")
    return out.getvalue().encode("utf-8", "surrogatepass")


def yamled(data: bytes, changes: list[Edit]) -> bytes:
    """A YAML file after edits of its tree, or of its bytes."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    tree = edited(yaml.safe_load(data), changes)
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def runs(folder: Path) -> list[Area]:
    """Seals, summary, configuration and tables of a run; what is read when one goes on."""
    own = run_folder(folder / "runs" / "own")
    near = run_folder(folder / "runs" / "near")
    given = yaml.safe_dump(CONFIG)
    newest = {str(own): "step=000000020.ckpt", str(near): "step=000000020.ckpt"}

    def neighbour() -> None:
        os.utime(own / "checkpoints" / newest[str(own)], (2e9, 2e9))
        found = find_checkpoint("last", str(folder / "runs"), given, None, True)
        if found.parent.parent != own:
            raise Silent(f"found {found}")

    def itself() -> None:
        find_checkpoint(near, str(folder / "runs"), given, None, True)

    def continued() -> None:
        with kept(near / "l0.csv"):
            table(near).put(15, [{"step": 15, "set": "heldout", "l0": 0.25}])

    def whole(data: bytes, changes: list[Edit]) -> bytes:
        return damaged_json(data, changes)

    seals = sorted((near / "checkpoints").glob("*.json"))
    small = [*seals, near / "summary.json"]
    held = sorted((near / "checkpoints").glob("*.ckpt"))

    def sealed(data: bytes, changes: list[Edit]) -> bytes:
        return pickled(data, changes)

    def resealed() -> None:
        """A checkpoint that is damaged, but whose seal says that it is what was written."""
        with kept(*seals):
            for path in held:
                if path.is_file() and not path.is_symlink():
                    seal_path = path.with_suffix(".json")
                    listed = json.loads(seal_path.read_text())
                    data = path.read_bytes()
                    listed[path.name] = {"size": len(data), "crc32": zlib.crc32(data)}
                    seal_path.write_text(json.dumps(listed))
            find_checkpoint(near, str(folder / "runs"), given, None, True)

    return [
        Area("neighbour of a run", [*small, near / "config.yaml"], mixed(whole, yamled), neighbour),
        Area("seal, summary, config", [*small, near / "config.yaml"], mixed(whole, yamled), itself),
        Area("tables of a run", [near / "l0.csv"], tabled, continued),
        Area("checkpoint", held, sealed, resealed),
    ]


@contextmanager
def kept(*files: Path) -> Iterator[None]:
    before = {path: path.read_bytes() if path.is_file() else None for path in files}
    try:
        yield
    finally:
        for path, data in before.items():
            if data is not None:
                path.write_bytes(data)


def mixed(one: Any, other: Any) -> Any:
    """Edits by what a file holds."""
    return lambda data, changes: (one if data[:1] == b"{" else other)(data, changes)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def pickled(data: bytes, changes: list[Edit]) -> bytes:
    """A checkpoint after edits of what it holds, or of its bytes; or one that would run code."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    held = {k: v for k, v in CHECKPOINT.items() if k != "state_dict"}
    tree = edited(held, changes)
    if changes[0].what % 4 == 0:
        tree = {"state_dict": {}, "evil": _Evil()}
    out = io.BytesIO()
    torch.save(tree | {"state_dict": {}} if isinstance(tree, dict) else tree, out)
    return out.getvalue()


def subjects(folder: Path) -> list[Area]:
    """A finished run as `evaluate.py` reads it: configuration, summary, card, text."""
    own, other = run_folder(folder / "runs" / "own"), run_folder(folder / "runs" / "other")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"w{i} w1 w2"}) + "\n" for i in range(40)))
    config = json.loads(json.dumps(CONFIG))
    config["data"]["train"]["init_args"]["path"] = str(text)
    for one in (own, other):
        (one / "config.yaml").write_text(yaml.safe_dump(config))
        BatchTopK(d_model=8, d_sae=16, target_l0=3).save(one / "head", {"lm": "tiny", "tokens": 10})
        os.utime(one / "head" / "head.json", (2e9, 2e9) if one == own else (1e9, 1e9))

    def read() -> None:
        subject = read_subject(other)
        subject.lm_args()
        data = subject.data(TOKENIZER())
        if data is not None and isinstance(data.train_corpus, LocalCorpus):
            data.train_corpus.open()
        if folder_named("last", str(folder / "runs")) != own:
            raise Silent("another run is the last one")

    files = [other / "config.yaml", other / "summary.json", other / "head" / "head.json"]
    return [Area("run as evaluated", files, mixed(damaged_json, yamled), read)]


def TOKENIZER() -> Any:  # noqa: N802
    from tests.conftest import word_tokenizer

    return word_tokenizer()


def records(folder: Path) -> list[Area]:
    """`eval/` of two runs: summaries, tables, done files."""
    pair = [record(folder / name, level=0.1 * n) for n, name in enumerate(("a", "b"), start=1)]
    out = pair[0] / "eval"
    (out / "done").mkdir()
    done = {
        **{"report": "losses", "fingerprint": "f", "settings": {"documents": 3}, "seconds": 1.5},
        **{"about": {"head_sha256": "x", "sets": {}}, "figures": {"delta_ce": 0.5}},
    }
    (out / "done" / "losses.json").write_text(json.dumps(done))
    (out / "latents.csv").write_text('latent,label\r\n0,"a, b"\r\n1,\r\n')
    (out / "concepts.csv").write_text(
        "subject,fact,latent,f1,precision,recall\r\nhead,x,1,0.5,0.5,0.5\r\nhead,y,2,,,\r\n"
    )
    (out / "interpretability.csv").write_text(
        "subject,latent,explanation,category,score,detection\r\nhead,1,e,low_level,3.0,0.5\r\n"
    )

    def compared() -> None:
        found = comparison.load(pair)
        comparison.conflicts(found, force=True)
        # a figure that cannot be told is None
        finite([list(row.values()) for row in comparison.table(found)], "figure")
        comparison.seed_table(found)

    def read() -> None:
        read_done(out / "done" / "losses.json")
        read_labels(out / "latents.csv")
        finite(read_csv(out / "concepts.csv", CONCEPTS))
        finite(read_csv(out / "interpretability.csv", SCORES))

    tables = [out / f"{n}.csv" for n in ("latents", "concepts", "interpretability")]
    return [
        Area("summary of a record", [out / "summary.json"], damaged_json, compared),
        Area("documents.csv", [out / "documents.csv"], tabled, compared),
        Area("tables of a record", tables, tabled, read),
        Area("done files", [out / "done" / "losses.json"], damaged_json, read),
    ]


# --------------------------------------------------------------------------------- cache, judge


def caches(folder: Path) -> list[Area]:
    """A cache of two shards."""
    key = {"d_model": 2, "lm": "a"}
    cache = ActivationCache(folder, key, [], True)
    for at in range(2):
        rows = torch.ones(5, 2).bfloat16()
        cache.write_(rows, ShardPlace(0, 0, at, 0), ShardPlace(0, 0, at + 1, 0), at)

    def read() -> None:
        found = ActivationCache.open(folder, key)
        for shard in found.upto(8).shards:
            rows = found.map(shard)
            found.check(shard, rows)
            finite(rows.float(), "rows")
        found.torn()

    return [Area("cache manifest", [folder / "manifest.json"], damaged_json, read)]


def judged(folder: Path) -> list[Area]:
    """What a server says, and what was kept of it."""
    kept_ = replies.ReplyCache(folder / "judge")
    key = replies.ReplyCache.key({"a": 1})
    content = json.dumps({"explanation": "names", "category": "low_level", "score": 3})
    said = {"content": content, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    kept_.write(key, {"model": "m"}, said | {"finish_reason": "stop", "refusal": None})
    kept_.refuse("server", "model", ["seed"])
    envelope = folder / "envelope.json"
    envelope.write_text(
        json.dumps(
            {
                "choices": [{"message": {"content": content}, "finish_reason": "stop"}],
                "model": "m",
                "usage": said["usage"],
            }
        )
    )
    inner = folder / "content.json"
    inner.write_text(content)

    def value(reply: Any) -> None:
        for parse in (parse_explanation, parse_labels(3)):
            found, failure, _ = _judged(reply, parse)  # type: ignore[arg-type]
            if found is None and not failure:
                raise Silent("neither an answer nor a reason")
            answer = _answer(found, failure, [reply])
            counts = [answer.calls, answer.input_tokens, answer.output_tokens]
            finite(counts, "usage")
            if any(isinstance(n, int) and n > 1 << 31 for n in counts):
                raise Silent(f"{answer} counts too many tokens")

    def read() -> None:
        reply = replies.ReplyCache(folder / "judge").read(key)
        if reply is not None:
            value(reply)
        kept_.refused("server", "model")
        for path in (envelope, inner):
            if path.is_file() and not path.is_symlink():
                text = path.read_bytes().decode("utf-8", "replace")
                value(_envelope(text) if path == envelope else {"content": text})

    files = [folder / "judge" / f"{key}.json", folder / "judge" / replies.REFUSED, envelope, inner]
    return [Area("judge replies", files, damaged_json, read)]


# ---------------------------------------------------------------------------------------- texts


def texts(folder: Path) -> list[Area]:
    """Text in files of every kind, as far as token rows."""
    rows = [f"w{i % 50} w{i % 7} w3" for i in range(60)]
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    plain = folder / "plain.txt"
    plain.write_text("\n".join(rows) + "\n")
    one = folder / "one.json"
    one.write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))
    parquet = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), parquet, row_group_size=20)
    asked = folder / "prompts.jsonl"
    prompt = {"category": "facts", "prompt": "Snow is", "answer": " white"}
    asked.write_text("".join(json.dumps(prompt) + "\n" for _ in range(3)))

    def changed(data: bytes, changes: list[Edit]) -> bytes:
        if data[:4] == b"PAR1":
            if changes[0].much % 3 == 0:
                return broken(data, changes)
            cells = edited(rows, changes)
            kinds = [[1, 2], {"a": 1}, None, "w1", 3, b"\xff"]
            try:
                column = pyarrow.array(cells if isinstance(cells, list) else [cells])
            except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
                column = pyarrow.array([kinds[changes[0].what % len(kinds)]] * 30)
            out = io.BytesIO()
            names = ("text", "text", "text", "other")
            name = names[changes[0].what % len(names)]
            try:
                pyarrow.parquet.write_table(pyarrow.table({name: column}), out)
            except pyarrow.ArrowNotImplementedError:  # an empty struct, which no file can hold
                out = io.BytesIO()
                pyarrow.parquet.write_table(pyarrow.table({name: ["a"] * 30}), out)
            return out.getvalue()
        if data[:1] != b"{" or changes[0].much % 3 == 0:
            return broken(data, changes)
        records = edited([json.loads(line) for line in data.splitlines()], changes)
        records = records if isinstance(records, list) else [records]
        said = "".join(json.dumps(r) + "\n" for r in records)
        return said.encode("utf-8", "surrogatepass")

    def read(path: Path) -> Any:
        def one_() -> None:
            data = TokenData(
                TOKENIZER(), str(path), None, val_fraction=0.3, val_tokens=64, ctx_len=16
            )
            data.setup("fit")
            # as a run reads it: a pass without any token ends with one line
            drought = Drought()
            for batch in data.stream(0, 0, 1, torch.zeros(3, dtype=torch.int64)):
                kept = int(batch.keep.sum())
                drought.check(kept, kept, batch.position)
                if kept:
                    return
            raise Silent("no token in any batch")

        return one_

    def questions() -> None:
        prompts.load(asked)

    kinds = (lines, plain, one, parquet)
    areas = [Area(f"text: {p.suffix}", [p], changed, read(p)) for p in kinds]
    return [*areas, Area("prompts", [asked], changed, questions)]


def models(folder: Path, lm: Path) -> list[Area]:
    """Configuration and tokenizer of an LM folder."""
    import shutil

    own = folder / "lm"
    shutil.copytree(lm, own)
    ids = torch.tensor([[0, 5, 6, 7]])
    text = folder / "words.txt"
    text.write_text("w1 w2 w3\n" * 20)

    def read() -> None:
        found = FrozenLM(str(own), "model.layers.1.mlp", untrained=True)
        TokenData(found.tokenizer, str(text), None, ctx_len=16, val_tokens=16)
        found.tokenizer("w1 w2")
        found.load_()
        finite(found.acts(ids), "activations")

    return [
        Area("config.json of an LM", [own / "config.json"], damaged_json, read),
        Area(
            "tokenizer of an LM",
            [own / "tokenizer.json", own / "tokenizer_config.json"],
            damaged_json,
            read,
        ),
    ]


def configs(folder: Path) -> list[Area]:
    """A user's own configuration, through `plan`."""
    own = folder / "own.yaml"
    tree = {
        "seed_everything": 1,
        "lm": {"name": "embedded", "hook_point": "model.layers.1.mlp", "dtype": "float32"},
        "model": {
            "tokens": 20_000,
            "sae_batch_tokens": 256,
            "head": {"class_path": "KANEncoder", "init_args": {"d_sae": 32, "target_l0": 4}},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}},
        },
        "data": {
            "train": {"class_path": "StoryWorldCorpus", "init_args": {"n_documents": 50}},
            "val": None,
            "val_fraction": 0.2,
            "val_tokens": 256,
            "ctx_len": 64,
        },
        "trainer": {"accelerator": "cpu", "precision": "32-true", "val_check_interval": 10},
    }
    own.write_text(yaml.safe_dump(tree))

    def plan() -> None:
        from kanllama_lightning.cli import train_command as cli
        from kanllama_lightning.types import InputError

        if cli.main(["plan", "--config", str(own)]) == 2:
            raise InputError("refused")

    return [Area("configs through plan", [own], yamled, plan)]


def every(folder: Path, lm: Path) -> dict[str, Area]:
    """All areas by name, each with files of its own."""
    found: list[Area] = []
    for make in (heads, foreign, runs, subjects, records, caches, judged, texts, configs):
        own = folder / make.__name__
        own.mkdir()
        found += make(own)
    (folder / "models").mkdir()
    found += models(folder / "models", lm)
    return {area.name: area for area in found}
