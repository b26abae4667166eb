"""Activations on disk: what is written, in which order it is read, and what is refused."""

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from kanllama_lightning.corpus import LocalCorpus, Mixture, StoryWorldCorpus
from kanllama_lightning.data.cached_activations import CachedStream
from kanllama_lightning.data.shards import MANIFEST, ActivationCache, ShardPlace
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.training import fill_cache as filling
from kanllama_lightning.training.cache_key import cache_key
from kanllama_lightning.training.fill_cache import chunks, fill_
from kanllama_lightning.types import ActivationBatch, InputError, TokenBatch
from tests.conftest import SMALL, Fit, only_run, terminate_at
from tests.hold import Fork, Forks

START = torch.zeros(3, dtype=torch.int64)
KEY = {"d_model": 2, "lm": "a"}


# ---------------------------------------------------------------- what a batch is trained on


def test_both_kinds_of_batch_give_rows(tokens: TokenBatch, make_lm) -> None:
    lm = make_lm()
    rows = tokens.activations(lm.acts)
    assert torch.equal(rows, lm.acts(tokens.ids)[tokens.keep])
    cached = ActivationBatch(rows, START).to(torch.device("cpu"))
    assert torch.equal(cached.activations(lambda _: pytest.fail("the LM is left alone")), rows)


# ------------------------------------------------------------------------ the order of reading


@pytest.fixture
def numbered(tmp_path: Path) -> ActivationCache:
    """Shards of 5, 5 and 3 rows; row i holds (i, 100 + i)."""
    cache = ActivationCache(tmp_path, KEY, [], True)
    rows = torch.arange(13).bfloat16()
    rows = torch.stack([rows, rows + 100], 1)
    for at, part in enumerate(rows.split([5, 5, 3])):
        cache.write_(part, ShardPlace(0, 0, at, 0), ShardPlace(0, 0, at + 1, 0), at)
    return ActivationCache.open(tmp_path, KEY)


def read(
    cache: ActivationCache, n: int, size: int = 4, rank: int = 0, world: int = 1, at=START, seed=3
):
    return list(islice(CachedStream(cache, size, seed, rank, world, at), n))


def numbers(batches: list[ActivationBatch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows[:, 0]]


def test_every_row_once_per_epoch_shard_by_shard(numbered: ActivationCache) -> None:
    seen = numbers(read(numbered, 39, size=1))
    epochs = [seen[:13], seen[13:26], seen[26:]]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    orders = set()
    for epoch in epochs:
        shard = [min(i // 5, 2) for i in epoch]
        changes = [a for a, b in zip(shard, [*shard[1:], None], strict=True) if a != b]
        assert sorted(changes) == [0, 1, 2], "one shard after the other"
        orders.add(tuple(changes))
    assert len(orders) > 1
    assert numbers(read(numbered, 39, size=1, seed=4)) != seen
    assert all(torch.equal(b.rows[:, 1], b.rows[:, 0] + 100) for b in read(numbered, 9))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_ranks_are_dealt_one_sequence(numbered: ActivationCache, world: int, size: int) -> None:
    alone = numbers(read(numbered, 12 * world, size))
    ranks = [read(numbered, 12, size, rank, world) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert numbers(batches) == alone[rank::world]
        assert all(len(batch.rows) == size for batch in batches)
        assert all(
            torch.equal(a.position, b.position) for a, b in zip(batches, ranks[0], strict=True)
        )


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_goes_on_from_any_position(numbered: ActivationCache, size: int) -> None:
    whole = read(numbered, 30, size)
    for n in range(1, 28):
        again = read(numbered, 2, size, at=whole[n - 1].position)
        for a, b in zip(whole[n : n + 2], again, strict=True):
            assert torch.equal(a.rows, b.rows)
            assert torch.equal(a.position, b.position)


def test_what_is_added_later_does_not_change_a_run(numbered: ActivationCache) -> None:
    before = numbers(read(numbered.upto(10), 20))
    assert numbered.upto(10).rows == 10
    assert numbered.upto(6).rows == 10
    assert numbered.upto(99).rows == 13
    extra = torch.full((4, 2), 50.0).bfloat16()
    numbered.write_(extra, ShardPlace(0, 0, 3, 0), ShardPlace(0, 0, 4, 0), 3)
    assert ActivationCache.open(numbered.folder, KEY).rows == 17
    assert numbers(read(ActivationCache.open(numbered.folder, KEY).upto(10), 20)) == before


def test_a_damaged_shard_is_said(numbered: ActivationCache) -> None:
    file = numbered.folder / "000001.bf16"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    assert numbered.torn() == []
    with pytest.raises(InputError, match=r"000001.bf16 is damaged \(checksum .*delete that file"):
        read(numbered, 9)
    file.write_bytes(data[:-1])
    assert numbered.torn() == [1]
    with pytest.raises(InputError, match=r"000001.bf16 is damaged \(missing, or not of 20 bytes"):
        read(numbered, 9)


def test_a_torn_manifest_is_said(numbered: ActivationCache) -> None:
    file = numbered.folder / MANIFEST
    file.write_text(file.read_text()[:-9])
    with pytest.raises(InputError, match=r"manifest.json: is no valid JSON"):
        ActivationCache.open(numbered.folder, KEY)


# ------------------------------------------------------------------------------------- writing


@pytest.fixture
def target(tiny_lm_dir: Path, text_file: Path, tmp_path: Path, monkeypatch):
    """Builds an LM and data that write into a folder, in shards of 100 rows."""
    monkeypatch.setattr(filling, "SHARD_ROWS", 100)
    monkeypatch.setattr(filling, "SMALLEST_SHARD_ROWS", 100)

    def make(folder: str = "cache", hook="model.layers.1.mlp", **kwargs):
        lm = FrozenLM(str(tiny_lm_dir), hook, untrained=True)
        kwargs = {"ctx_len": 32, "lm_batch_seqs": 4, "val_tokens": 512} | kwargs
        kwargs = {"train": str(text_file), "cache": str(tmp_path / folder)} | kwargs
        data = TokenData(lm.tokenizer, **kwargs)
        data.setup("fit")
        return lm, data

    return make


def fill(lm: FrozenLM, data: TokenData, rows: int = 1000) -> ActivationCache:
    fill_(lm, data, rows, torch.device("cpu"))
    assert data.cached is not None
    return data.cached


def all_rows(cache: ActivationCache) -> torch.Tensor:
    return torch.cat([cache.map(shard) for shard in cache.shards])


def test_holds_the_kept_activations_of_the_text_in_order(target) -> None:
    lm, data = target()
    cache = fill(lm, data, 1010)
    assert [shard.rows for shard in cache.shards] == [100] * 11
    want = [b.activations(lm.acts) for b in islice(data.stream(0, 0, 1, START), 20)]
    assert torch.equal(all_rows(cache), torch.cat(want)[:1100].bfloat16())
    (batch,) = islice(data.train_dataloader(), 1)
    assert isinstance(batch, ActivationBatch)
    assert batch.rows.shape == (4 * 32, 16)
    assert not list(cache.folder.glob("*.tmp"))


def test_a_worker_gives_the_same_batches(target) -> None:
    made = []
    for workers in (0, 1):
        lm, data = target(workers=workers)
        with pytest.raises(InputError, match="nothing was written there for this data yet"):
            data.train_dataloader()
        fill(lm, data)
        made.append(list(islice(data.train_dataloader(), 20)))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.position, b.position)


def test_other_processes_of_a_launcher_wait(target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "POLL_SECONDS", 0.01)
    (lm, data), (other_lm, other) = target(), target()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            filling._wait, Path(str(other.cache)), cache_key(other_lm, other), 1000
        )
        fill(lm, data, 900)
        assert not waiting.done()
        fill(lm, data, 1000)
        assert waiting.result(timeout=20).rows == 1000
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fill(other_lm, other).rows == 1000
    assert other_lm._model is None


def test_continues_behind_the_last_whole_shard(target) -> None:
    """Whatever the batch size it goes on with; what a killed writer left unlisted is replaced."""
    undisturbed = all_rows(fill(*target("undisturbed")))
    fill(*target(), rows=300)
    (fill(*target(), rows=300).folder / "000003.bf16").write_bytes(b"half")
    for seqs, rows in ((1, 500), (7, 1000)):
        lm, data = target(lm_batch_seqs=seqs)
        assert fill(lm, data, rows).rows == rows
    cache = fill(*target())
    assert torch.allclose(all_rows(cache).float(), undisturbed.float(), rtol=1e-2, atol=1e-3)
    assert (all_rows(cache) != undisturbed).float().mean() < 0.01, "rounding of other shapes only"


def test_a_torn_shard_is_written_anew(target) -> None:
    cache = fill(*target())
    want = all_rows(cache)
    os.truncate(cache.folder / "000002.bf16", 50)
    (cache.folder / "000009.bf16").unlink()
    again = fill(*target())
    assert torch.equal(all_rows(again), want)
    assert again.shards == cache.shards


def test_the_text_is_cached_once_at_most(target, caplog: pytest.LogCaptureFixture) -> None:
    lm, data = target()
    with caplog.at_level("INFO"):
        cache = fill(lm, data, 10**6)
    want = []
    for batch in data.stream(0, 0, 1, START):
        keep = batch.keep & (batch.doc < 2**40)
        want.append(lm.acts(batch.ids)[keep])
        if batch.position[0]:
            break
    assert torch.equal(all_rows(cache), torch.cat(want).bfloat16())
    assert cache.whole
    assert f"the text ends after {cache.rows:,} activations" in caplog.text
    assert "so they repeat" in caplog.text
    lm._model = None
    assert fill(lm, data, 10**6).rows == cache.rows
    assert lm._model is None, "nothing is left to be written"
    os.truncate(cache.folder / cache.shards[-1].name, 2)
    assert torch.equal(all_rows(fill(lm, data, 10**6)), torch.cat(want).bfloat16())


def test_chunks_of_any_size_are_the_same_rows(target) -> None:
    lm, data = target()
    lm.load_()

    def batches(place: ShardPlace):
        return data.stream(0, 0, 1, torch.tensor(place[:3]))

    start = ShardPlace(0, 0, 0, 0)
    (whole,) = islice(chunks(batches, lm.acts, start, 700), 1)
    for size in (1, 33, 100, 350):
        some = list(islice(chunks(batches, lm.acts, start, size), 700 // size))
        assert torch.equal(torch.cat([c.rows for c in some]), whole.rows[: len(some) * size])
        (after,) = islice(chunks(batches, lm.acts, some[-1].start, size), 1)
        assert torch.allclose(after.rows.float(), some[-1].rows.float(), rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hook": "model.layers.0"}, "lm.hook_point: 'blocks.1.hook_mlp_out' in the cache, "),
        ({"ctx_len": 16}, "data.ctx_len: 32 in the cache, 16 wanted"),
        ({"append_eos": False}, "data.append_eos: True in the cache, False wanted"),
        ({"val_fraction": 0.3}, "held out: "),
        ({"train": "mixture"}, "data.train.class: 'LocalCorpus' in the cache, 'Mixture' wanted"),
    ],
)
def test_activations_of_something_else_are_refused(
    target, text_file: Path, change: dict, named: str
) -> None:
    if "train" in change:
        change = {"train": Mixture([str(text_file)], [1.0])}
    fill(*target(), rows=100)
    with pytest.raises(InputError, match="holds the activations of something else") as error:
        fill(*target(**change), rows=100)
    assert named in str(error.value)
    assert "Give another folder" in str(error.value)


def test_what_may_differ(target) -> None:
    fill(*target(), rows=100)
    fill(*target(seed=5, lm_batch_seqs=3, val_batch_seqs=2, cache_tokens=150), rows=100)


def test_contents_count_not_places(tmp_path: Path, tiny_lm_dir: Path, text_file: Path) -> None:
    import shutil

    def key(folder: Path, text: Path):
        lm = FrozenLM(str(folder), "model.layers.1.mlp", untrained=True)
        data = TokenData(lm.tokenizer, str(text), ctx_len=32, val_tokens=512)
        data.setup("fit")
        return cache_key(lm, data)

    moved = shutil.copytree(tiny_lm_dir, tmp_path / "moved")
    text = Path(shutil.copy(text_file, tmp_path))
    want = key(tiny_lm_dir, text_file)
    assert key(moved, text) == want
    text.write_text(text.read_text().replace("w7", "w8", 1))
    assert key(moved, text)["data.train.files"] != want["data.train.files"]
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert key(moved, text_file)["lm"] != want["lm"]


def test_a_mixture_tells_its_parts_and_shares(text_file: Path) -> None:
    def describe(weights: list[float]):
        return Mixture([LocalCorpus(str(text_file)), StoryWorldCorpus(9)], weights).description()

    assert describe([1, 3]) == describe([2, 6])
    assert describe([1, 3]) != describe([3, 1])
    assert describe([1, 3])["1.n_documents"] == 9


def test_no_room(target, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = filling.shutil._ntuple_diskusage(10, 10, 32 * 150)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"at most 150 would fit"):
        fill(*target(), rows=151)
    assert not list((Path(target()[1].cache)).glob("*.bf16"))
    fill(*target(), rows=100)


# ------------------------------------------------------------------------------- the command line


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SAEHead.load(folder / "head").state_dict()


@pytest.mark.slow
def test_trains_as_well_as_live_and_never_runs_the_lm_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    acts = FrozenLM.acts

    def counted(self: FrozenLM, ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        return acts(self, ids)

    monkeypatch.setattr(FrozenLM, "acts", counted)
    cache = f"--data.cache={tmp_path / 'cache'}"
    given = {"model.tokens": "6400", "trainer.val_check_interval": "100", "trainer.logger": "false"}
    given |= {"data.val_tokens": "2048"}
    assert fit(run=str(tmp_path / "live"), **given) == 0
    live, calls[:] = len(calls), []
    assert fit(cache, run=str(tmp_path / "first"), **given) == 0
    assert 0 < len(calls) < 1.5 * live
    calls.clear()
    assert fit(cache, run=str(tmp_path / "second"), **given) == 0
    assert calls == []
    fvu = {name: summary(tmp_path / name)["val/fvu"] for name in ("live", "first", "second")}
    assert fvu["first"] == pytest.approx(fvu["live"], rel=0.05)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)
    # another head, seed and budget, same activations
    given |= {"model.head": "TopK", "model.tokens": "640"}
    assert fit("--seed_everything=1", cache, run=str(tmp_path / "third"), **given) == 0
    assert calls == []
    assert math.isfinite(summary(tmp_path / "third")["val/delta_ce"])


@pytest.mark.slow
def test_stopped_and_continued_is_the_same_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("--data.cache", str(tmp_path / "cache"), "--data.cache_tokens", "1500")
    assert fit(*cache, runs_dir=str(tmp_path / "undisturbed")) == 0
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()

    terminate_at(monkeypatch, 13, 30)
    assert fit(*cache) == 128 + signal.SIGTERM
    # another run extends the cache meanwhile
    assert fit(*cache[:2], run=str(tmp_path / "other"), trainer__max_steps="1") == 0
    assert fit(*cache, "--ckpt_path=last") == 128 + signal.SIGTERM
    assert fit(*cache, "--ckpt_path=last") == 0
    for name, value in weights(undisturbed).items():
        assert torch.equal(value, weights(only_run(tmp_path))[name]), name
    assert (undisturbed / "l0.csv").read_text() == (only_run(tmp_path) / "l0.csv").read_text()


def test_mistakes(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit("--data.cache_tokens=5") == 2
    assert "data.cache_tokens=5" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert fit(f"--data.cache={tmp_path / 'file' / 'cache'}") == 2
    assert "file/cache" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir()), "a mistake leaves no empty run behind"


@pytest.mark.slow
def test_interrupted_writing_ends_with_a_line(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C after two shards: they are kept, the run folder is not; the same command goes on."""
    given = f"--data.cache={tmp_path / 'cache'}"
    original = ActivationCache.write_

    def interrupted(self: ActivationCache, *args: Any) -> None:
        if len(self.shards) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *args)

    monkeypatch.setattr(ActivationCache, "write_", interrupted)
    assert fit(given) == 128 + signal.SIGINT == 130
    said = capsys.readouterr().err.splitlines()[-1]
    rows = json.loads((tmp_path / "cache" / MANIFEST).read_text())["rows"]
    assert rows == 2 * filling.SMALLEST_SHARD_ROWS
    assert said == (
        f"stopped; cache {tmp_path / 'cache'} holds {rows:,} activations, the same command goes on "
        "from its last whole shard"
    )
    assert not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(ActivationCache, "write_", original)
    assert fit(given) == 0
    assert summary(only_run(tmp_path))["finished"]


@pytest.mark.slow
def test_a_killed_writer_goes_on(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path, forks: Forks
) -> None:
    """kill -9 while shards are being written, twice; two runs at once share one writer."""

    def start(run: str) -> Fork:
        given = SMALL | {"lm.name": tiny_lm_dir, "data.train": text_file, "trainer.logger": "false"}
        given |= {"run": tmp_path / run, "data.cache": tmp_path / "cache", "model.tokens": 5120}
        given |= {"data.lm_batch_seqs": 1}
        args = [f"--{k}={v}" for k, v in given.items()]
        return forks.start(["train.py", "fit", *args], tmp_path / f"{run}.log")

    shards = tmp_path / "cache"
    written = 0
    for run in ("a", "b"):
        process = start(run)
        while process.running() and len(list(shards.glob("*.bf16"))) < written + 2:
            time.sleep(0.002)
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        written = len(list(shards.glob("*.bf16")))
        assert json.loads((shards / MANIFEST).read_text())["rows"] < 5632, "killed while writing"
    both = [start("c"), start("d")]
    assert [process.wait() for process in both] == [0, 0]
    assert summary(tmp_path / "c")["val/fvu"] == summary(tmp_path / "d")["val/fvu"]
