"""Pages for Neuronpedia: as its tables say they must be, and what head and LM really do."""

import errno
import gzip
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from kanllama_lightning import heads
from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.exchange import neuronpedia
from kanllama_lightning.exchange.foreign_files import PART
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.hook_points import HookPoint
from kanllama_lightning.measures.linear_bins import LinearBins
from kanllama_lightning.reports import token_sets as texts
from kanllama_lightning.reports.labels import Known
from kanllama_lightning.reports.neuronpedia_pages import look, pages
from kanllama_lightning.reports.saved_head import read_subject, shared_lm
from kanllama_lightning.types import InputError, TokenBatch
from tests.conftest import Finished

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "neuronpedia.md").read_text()
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "int": lambda v: type(v) is int,
    "number": lambda v: type(v) in (int, float) and math.isfinite(v),
}
"""Types of the tables of the document."""


class Field(NamedTuple):
    """A line of a table of the document."""

    kind: str
    required: bool


def tables() -> list[dict[str, Field]]:
    """The tables of fields, in order: batch, latent, context, then the six of rows."""
    found: list[dict[str, Field]] = []
    for line in DOCUMENT.splitlines():
        if line.startswith("| field |"):
            found.append({})
        cells = re.match(r"\| `(\w+)` \| ([\w\[\]]+) \| (yes|no) \|", line)
        if cells:
            found[-1][cells[1]] = Field(cells[2], cells[3] == "yes")
    return found


BATCH, LATENT, CONTEXT, NEURON, ACTIVATION, EXPLANATION, RELEASE, MODEL, SET, SOURCE = tables()
OWN = ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")
NEURON |= {name: field for name, field in LATENT.items() if name not in OWN}
ROWS = {"features": NEURON, "activations": ACTIVATION, "explanations": EXPLANATION}
SMALL_FILES = {"release": RELEASE, "model": MODEL, "sourceset": SET, "source": SOURCE}


def wrong(value: dict[str, Any], table: dict[str, Field]) -> list[str]:
    """What is not as the table has it."""
    said = [name for name, field in table.items() if field.required and name not in value]
    said += [name for name in value if name not in table]
    for name in value.keys() & table.keys():
        kind = table[name].kind
        single = KINDS.get(kind.removesuffix("[]"), lambda v: isinstance(v, dict))
        many = value[name] if kind.endswith("[]") else [value[name]]
        if not isinstance(many, list) or not all(map(single, many)):
            said.append(f"{name} is no {kind}")
    return said


def lines(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    text = gzip.decompress(raw).decode() if path.suffix == ".gz" else raw.decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


class Bundle(NamedTuple):
    """What was written about a finished run, by plain JSON alone."""

    run: Path
    out: Path
    printed: str
    features: list[dict[str, Any]]
    home: Path

    def rows(self, name: str) -> list[dict[str, Any]]:
        numbered = sorted((self.home / name).iterdir(), key=lambda p: int(p.name.split(".")[0][6:]))
        return [row for path in numbered for row in lines(path)]


def export(run: Path, out: Path, *extra: str) -> int:
    args = ["export", str(run), "--to=neuronpedia", f"--out={out}", "--lm.untrained=true"]
    return evaluate([*args, *extra])


def bundle_of(run: Path, out: Path, printed: str = "") -> Bundle:
    batches = sorted((out / "dashboards").iterdir(), key=lambda p: int(p.stem[6:]))
    features = [f for path in batches for f in json.loads(path.read_text())["features"]]
    (model,) = (out / "exports").iterdir()
    (home,) = model.iterdir()
    return Bundle(run, out, printed, features, home)


@pytest.fixture(scope="module")
def bundle(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Pages of a run whose record has an explanation of latent 3, in files of 9 latents."""
    folder = tmp_path_factory.mktemp("neuronpedia")
    run = folder / "run"
    shutil.copytree(finished.folder, run, symlinks=True)
    record = run / "eval"
    (record / "done").mkdir(parents=True)
    (record / "summary.json").write_text(json.dumps({"head_sha256": read_subject(run).sha256}))
    judged = {"subject": "head", "latent": 3, "explanation": "the word, at \u2028its end",
              "category": "token", "score": 4, "detection": 0.9}  # fmt: skip
    pd.DataFrame([judged]).to_csv(record / "interpretability.csv", index=False)
    done = {"report": "interpretability", "settings": {"model": "judge-1"}}
    (record / "done" / "interpretability.json").write_text(json.dumps(done))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "PER_FILE", 9)
        assert export(run, folder / "out", "--model_id=tiny-lm", "--sae_set=mlp-test") == 0
    return bundle_of(run, folder / "out")


class Brute:
    """Head and LM on the held-out text, the long way round."""

    def __init__(self, run: Path) -> None:
        subject = read_subject(run)
        self.head = subject.head
        self.lm = shared_lm([subject], {"untrained": True}, "float32").load_()
        data = subject.data(self.lm.tokenizer)
        assert data is not None
        self.rows = texts.run_sets(data, None)["heldout"]
        with torch.no_grad():
            acts = self.lm.acts(self.rows.ids).float()
            mask = self.rows.keep & (acts.norm(dim=2) <= self.head.norm_limit)
            self.z = torch.zeros(*mask.shape, self.head.d_sae)
            self.z[mask] = self.head.encode(acts[mask])
        self.flat = self.z[mask].double().numpy()
        self.words = [
            self.lm.tokenizer.convert_ids_to_tokens(row) for row in self.rows.ids.tolist()
        ]


@pytest.fixture(scope="module")
def brute(bundle: Bundle) -> Brute:
    return Brute(bundle.run)


def test_every_file_is_as_the_tables_say(bundle: Bundle) -> None:
    batches = sorted((bundle.out / "dashboards").iterdir())
    assert len(batches) > 2
    for path in batches:
        batch = json.loads(path.read_text())
        assert wrong(batch, BATCH) == []
        assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny-lm", 1, "mlp-test")
        for feature in batch["features"]:
            assert wrong(feature, LATENT) == []
            assert [w for one in feature["activations"] for w in wrong(one, CONTEXT)] == []
    for name, table in SMALL_FILES.items():
        (row,) = lines(bundle.home / f"{name}.jsonl")
        assert wrong(row, table) == [], name
    for name, table in ROWS.items():
        for path in (bundle.home / name).iterdir():
            rows = lines(path)
            assert [w for row in rows for w in wrong(row, table)] == []
            # the importer takes the columns of all from the first
            assert {tuple(row) for row in rows} == {tuple(rows[0])}


def test_the_tables_find_what_is_wrong(bundle: Bundle) -> None:
    feature = dict(bundle.features[0])
    assert wrong(feature | {"frac_nonzero": float("nan")}, LATENT) == ["frac_nonzero is no number"]
    assert wrong(feature | {"pos_str": [1]}, LATENT) == ["pos_str is no text[]"]
    assert wrong(feature | {"more": 1}, LATENT) == ["more"]
    assert wrong({k: v for k, v in feature.items() if k != "dataset"}, LATENT) == ["dataset"]


def test_rows_refer_to_each_other(bundle: Bundle) -> None:
    model, source, group, release = (
        lines(bundle.home / f"{name}.jsonl")[0]
        for name in ("model", "source", "sourceset", "release")
    )
    assert bundle.home.parts[-2:] == (model["id"], source["id"]) == ("tiny-lm", "1-mlp-test")
    assert source["setName"] == group["name"] == "mlp-test"
    assert group["releaseName"] == release["name"]
    assert (model["layers"], model["neuronsPerLayer"], model["dimension"]) == (3, 32, 16)
    latents = {row["index"] for row in bundle.rows("features")}
    assert len(latents) == len(bundle.features) == read_subject(bundle.run).head.d_sae
    for name in ROWS:
        for row in bundle.rows(name):
            assert (row["modelId"], row["layer"]) == ("tiny-lm", "1-mlp-test")
            assert row["index"] in latents
    keys = [row["id"] for name in ("activations", "explanations") for row in bundle.rows(name)]
    assert len(set(keys)) == len(keys)


def test_both_forms_say_the_same(bundle: Bundle) -> None:
    rows, contexts = bundle.rows("features"), bundle.rows("activations")
    assert [row["index"] for row in rows] == [str(f["feature_index"]) for f in bundle.features]
    for row, feature in zip(rows, bundle.features, strict=True):
        assert {k: row[k] for k in feature if k not in OWN} == {
            k: v for k, v in feature.items() if k not in OWN
        }
        own = [c for c in contexts if c["index"] == row["index"]]
        assert len(own) == len(feature["activations"])
        for one, other in zip(own, feature["activations"], strict=True):
            assert (one["tokens"], one["values"]) == (other["tokens"], other["values"])
            assert one["maxValue"] == one["values"][one["maxValueTokenIndex"]] == max(one["values"])
            assert one["minValue"] == min(one["values"])
            assert one["qualifyingTokenIndex"] == other["qualifying_token_index"]
            assert [one[k] for k in ("binMin", "binMax", "binContains")] == [
                other[k] for k in ("bin_min", "bin_max", "bin_contains")
            ]


def test_explanations_are_those_of_the_record(bundle: Bundle) -> None:
    (row,) = bundle.rows("explanations")
    assert (row["index"], row["description"]) == ("3", "the word, at \u2028its end")
    assert "judge-1" in row["notes"]
    # a record of other weights is none
    (bundle.run / "eval" / "summary.json").write_text(json.dumps({"head_sha256": "0" * 64}))
    assert export(bundle.run, bundle.out.parent / "other", "--tokens=300") == 0
    other = bundle_of(bundle.run, bundle.out.parent / "other")
    assert other.rows("explanations") == []


def test_shares_maxima_and_histograms_are_those_of_the_head(bundle: Bundle, brute: Brute) -> None:
    alive = 0
    for j, feature in enumerate(bundle.features):
        z = brute.flat[:, j]
        fires = z[z != 0]
        assert feature["frac_nonzero"] == pytest.approx(len(fires) / len(z), abs=1e-12)
        middles, heights = (
            np.array(feature[f"freq_hist_data_bar_{k}"]) for k in ("values", "heights")
        )
        assert heights.sum() == len(fires)
        (row,) = [r for r in bundle.rows("features") if r["index"] == str(j)]
        assert row["maxActApprox"] == pytest.approx(z.max(), rel=1e-5)
        shown = [c["maxValue"] for c in bundle.rows("activations") if c["index"] == str(j)]
        assert row["maxActApprox"] == max(shown, default=0)
        if not len(fires):
            assert feature["activations"] == []
            assert not len(heights)
            continue
        alive += 1
        width = middles[1] - middles[0]
        assert middles == pytest.approx((np.arange(len(middles)) + 0.5) * width, rel=1e-6)
        assert 33 <= len(middles) <= 64
        assert middles[-1] - width / 2 <= fires.max() <= middles[-1] + width / 2
        counted, _ = np.histogram(fires, np.arange(len(middles) + 1) * width)
        assert abs(counted - heights).sum() <= 2  # on an edge, within rounding
    assert alive > 10


def test_contexts_are_places_of_the_text(bundle: Bundle, brute: Brute) -> None:
    """Found by their words alone: there the head does what they say."""
    joined = ["\n".join(row) + "\n" for row in brute.words]
    for feature in bundle.features:
        j = feature["feature_index"]
        for context in feature["activations"]:
            tokens = context["tokens"]
            assert "<bos>" not in tokens
            assert 0 < len(tokens) == len(context["values"]) <= 64
            said = "\n".join(tokens) + "\n"
            places = [
                (row, text[: at.start()].count("\n"))
                for row, text in enumerate(joined)
                for at in re.finditer(f"(?:^|(?<=\n)){re.escape(said)}", text)
            ]
            assert any(
                np.allclose(brute.z[row, at : at + len(tokens), j], context["values"],
                            rtol=2e-3, atol=1e-6)
                for row, at in places
            )  # fmt: skip
            peak = context["values"][context["qualifying_token_index"]]
            assert peak > 0
            assert context["bin_min"] <= peak <= context["bin_max"] * (1 + 1e-6)


def test_the_strongest_come_first_and_parts_of_the_range_after(
    bundle: Bundle, brute: Brute
) -> None:
    docs = brute.rows.doc
    for feature in bundle.features:
        j = feature["feature_index"]
        shown = feature["activations"]
        if not shown:
            continue
        top = [c for c in shown if c["bin_min"] == -1]
        z = brute.z[..., j]
        best = sorted((float(z[docs == d].max()) for d in docs[z > 0].unique()), reverse=True)
        peaks = [c["values"][c["qualifying_token_index"]] for c in top]
        assert peaks == pytest.approx(best[:20], rel=1e-5)
        assert {c["bin_contains"] for c in top} == {-1}
        assert [c["bin_max"] for c in top] == pytest.approx([best[0]] * len(top), rel=1e-5)
        parts = {(c["bin_min"], c["bin_max"]): c["bin_contains"] for c in shown[len(top) :]}
        assert list(parts) == sorted(parts, reverse=True)
        for (low, high), share in parts.items():
            z_j = brute.flat[:, j]
            last = high == pytest.approx(best[0], rel=1e-5)
            inside = (z_j >= low) & ((z_j <= high * (1 + 1e-5)) if last else (z_j < high))
            assert share == pytest.approx(inside.mean(), abs=1.5 / len(z_j))
            assert (high - low) / best[0] == pytest.approx(0.2, abs=0.05)
        each = Counter((c["bin_min"], c["bin_max"]) for c in shown[len(top) :])
        assert max(each.values(), default=0) <= 5


def test_tokens_are_those_of_the_direction(bundle: Bundle, brute: Brute) -> None:
    model = brute.lm.model
    with torch.no_grad():
        unembed = model.lm_head.weight.double() * model.model.norm.weight.double()
        W_dec = brute.head.state_dict()["decoder.W_dec"].double()
    for feature in bundle.features:
        direction = W_dec[feature["feature_index"]]
        logits = unembed @ direction
        for end, sign in (("pos", -1), ("neg", 1)):
            order = (sign * logits).argsort(stable=True)[:10]
            assert feature[f"{end}_values"] == pytest.approx(
                logits[order].tolist(), rel=1e-4, abs=1e-6
            )
            known = brute.lm.tokenizer
            words = [f"<id {i}>" if i >= len(known) else known.convert_ids_to_tokens(i)
                     for i in order.tolist()]  # fmt: skip
            assert feature[f"{end}_str"] == words
        counted, edges = np.histogram(logits.numpy(), 50)
        assert sum(feature["logits_hist_data_bar_heights"]) == len(logits)
        assert abs(counted - feature["logits_hist_data_bar_heights"]).sum() <= 4
        middles = (edges[1:] + edges[:-1]) / 2
        assert feature["logits_hist_data_bar_values"] == pytest.approx(middles, rel=1e-3, abs=1e-5)
        largest = direction.topk(3)
        assert feature["neuron_alignment_indices"] == largest.indices.tolist()
        assert feature["neuron_alignment_values"] == pytest.approx(
            largest.values.tolist(), rel=1e-5
        )
        shares = largest.values.abs() / direction.abs().sum()
        assert feature["neuron_alignment_l1"] == pytest.approx(shares.tolist(), rel=1e-5)


def test_the_command_says_what_it_wrote_and_replaces_it(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "np"
    stale = out / "dashboards" / "batch-9.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    assert export(run_folder, out, "--tokens=300") == 0
    said = capsys.readouterr().out
    assert "latents of BatchTopK" in said
    assert re.search(r"over 2\d\d tokens of 'heldout'", said)
    assert "Nothing was sent" in said
    assert "No explanations" in said
    assert not stale.exists()
    found = bundle_of(run_folder, out)
    assert found.home.name.startswith("1-mlp-batchtopk-")
    first = found.rows("activations")
    assert found.features[0]["n_prompts_total"] * found.features[0]["n_tokens_in_prompt"] >= 300
    assert export(run_folder, out, "--tokens=300") == 0
    assert found.rows("activations") == first  # the same keys: nothing is imported twice


@pytest.mark.parametrize("there", ["dashboards/board.json", "exports/m/s/notes/mine.txt"])
def test_files_of_others_are_left_alone(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    theirs = tmp_path / "np" / there
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    assert export(run_folder, tmp_path / "np", "--tokens=300") == 2
    assert f"{there!r} is not of an export to Neuronpedia" in capsys.readouterr().err
    assert theirs.read_text() == "mine"


def test_an_export_that_ends_early_leaves_the_earlier_one(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and PART not in path.parts
        }

    out = tmp_path / "np"
    assert export(run_folder, out, "--tokens=300") == 0
    before = files()
    monkeypatch.setattr(neuronpedia, "PER_FILE", 8)
    write, written = neuronpedia.write_text, []

    def fails_at_the_third(path: Path, text: str) -> Path:
        written.append(path)
        if path.name == "batch-2.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, text)

    monkeypatch.setattr(neuronpedia, "write_text", fails_at_the_third)
    assert export(run_folder, out, "--tokens=300") != 0
    assert not (out / PART).exists()
    assert any(path.name == "batch-1.json" for path in written)
    assert files() == before
    monkeypatch.setattr(neuronpedia, "write_text", write)
    moved, move = [], Path.replace

    def fails_at_the_last(path: Path, target: Path) -> Path:
        if PART in path.parts and path.parent.name not in ("new", "old"):
            moved.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))
        return move(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fails_at_the_last)
        assert export(run_folder, out, "--tokens=300") != 0
    assert moved
    assert files() == before
    assert export(run_folder, out, "--tokens=300") == 0
    assert (out / neuronpedia.BATCHES / "batch-2.json").exists()
    assert not (out / PART).exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--model_id", "Llama 3"], "--model_id 'Llama 3': Neuronpedia takes up to 128 lower-case"),
        (["--sae_set", "../up"], "--sae_set '../up': Neuronpedia takes"),
        (["--sae_set="], "--sae_set"),
        (["--to", "saelens", "--model_id", "x"], "--model_id: goes with --to neuronpedia"),
        (["--tokens", "0"], "--tokens=0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    finished: Finished, tmp_path: Path, extra: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert export(finished.folder, tmp_path / "out", *extra) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_what_has_no_text_or_no_room_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run_folder / "head", tmp_path / "out") == 2
    assert "does not say which text to evaluate on" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert export(run_folder, tmp_path) == 2
    assert "holds mine.txt already" in capsys.readouterr().err


def test_an_sae_of_another_project_has_pages_too(bundle: Bundle, text_file: Path) -> None:
    out = bundle.out.parent / "imported"
    assert evaluate(["export", str(bundle.run), "--to=saelens", f"--out={out / 'sae'}",
                     "--lm.untrained=true", "--tokens=64"]) == 0  # fmt: skip
    more = [f"--text={text_file}", "--ctx_len=32", "--tokens=600"]
    assert export(out / "sae", out / "pages", *more) == 0
    theirs = bundle_of(out / "sae", out / "pages").features
    assert [f["pos_str"] for f in theirs] == [f["pos_str"] for f in bundle.features]
    assert {f["dataset"] for f in theirs} == {"words"}
    assert bundle.features[0]["dataset"] == "words"
    assert sum(f["frac_nonzero"] > 0 for f in theirs) > 10


def rows_of(tokens: TokenBatch) -> Rows:
    return Rows(tokens.ids, tokens.keep, tokens.doc)


def started(name: str, lm: FrozenLM, tokens: TokenBatch) -> SAEHead:
    kind = getattr(heads, name)
    head = kind(d_model=16, d_sae=24, target_l0=3)
    x = lm.acts(tokens.ids)[tokens.keep].float()
    head.start_(x)
    head.calibrate_(x)
    head.norm_limit.fill_(1e6)
    return head.eval()


@pytest.mark.parametrize("name", ["CurvedDictionary", "KANEncoder"])
def test_a_curved_latent_is_read_by_its_secant(
    name: str, make_lm: Callable[..., FrozenLM], tokens: TokenBatch
) -> None:
    lm = make_lm()
    head = started(name, lm, tokens)
    looked = look(head, lm, rows_of(tokens), "made", 2)
    every = list(pages(looked, lm, Known({}, {})))
    assert [page.latent for page in every] == list(range(24))
    at = looked.contexts.meter.quantile(0.5).float()
    told = 0
    for page in every:
        j = page.latent
        if not page.frequency or not page.raised:
            continue
        told += 1
        codes = torch.zeros(2, 24)
        codes[1, j] = at[j]
        with torch.no_grad():
            nothing, alone = head.decode(codes)
            secant = (alone - nothing) * head.scale / at[j]
            logits = (secant * lm.model.model.norm.weight) @ lm.unembed()
        assert page.raised[0][1] == pytest.approx(float(logits.max()), rel=1e-3, abs=1e-4)
        assert page.lowered[0][1] == pytest.approx(float(logits.min()), rel=1e-3, abs=1e-4)
    assert told > 3


def test_latents_of_both_signs_and_silent_heads_are_refused(
    make_lm: Callable[..., FrozenLM], tokens: TokenBatch
) -> None:
    lm = make_lm()
    with pytest.raises(InputError, match="have both signs"):
        look(started("DenseOnlyKAN", lm, tokens), lm, rows_of(tokens), "made", 2)
    head = started("BatchTopK", lm, tokens)
    head.state_dict()["selection.threshold"].fill_(1e9)
    with pytest.raises(InputError, match="none fires on .* tokens of 'made'"):
        look(head, lm, rows_of(tokens), "made", 2)


@pytest.mark.parametrize("batches", [1, 7])
def test_linear_bins_count_as_numpy_does(batches: int) -> None:
    """Whatever the batches and the sizes: 14 octaves, powers of two among them, and zeros."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(700, 9, generator=generator).exp() * 2.0 ** torch.arange(-6, 3)
    z[torch.rand(z.shape, generator=generator) < 0.5] = 0
    z[:3, 2] = torch.tensor([0.25, 0.5, 1.0])
    z[:, 5] = 0
    bins = LinearBins(9)
    for some in z.tensor_split(batches):
        rows, latents = some.nonzero(as_tuple=True)
        bins.update(SparseCodes(some[rows, latents], rows, latents, len(some), 9))
    assert not len(bins.bars(5)[0])
    for j in set(range(9)) - {5}:
        middles, counts = bins.bars(j)
        width = bins.width(j)
        values = z[:, j][z[:, j] > 0].double().numpy()
        assert math.log2(width) == int(math.log2(width))
        assert 33 <= len(counts) <= 64
        assert (len(counts) - 1) * width <= values.max() < len(counts) * width
        assert middles.tolist() == [(i + 0.5) * width for i in range(len(counts))]
        wanted, _ = np.histogram(values, np.arange(len(counts) + 1) * width)
        assert counts.tolist() == wanted.tolist()


def test_names_are_those_of_the_site() -> None:
    """Of Llamas that the site has (np_model_to_hf.json); and of others something it takes."""
    known = {
        "meta-llama/Llama-3.1-8B": "llama3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct": "llama3.1-8b-it",
        "meta-llama/Llama-3.3-70B-Instruct": "llama3.3-70b-it",
        "embedded": "embedded",
        "/models/My LM (v2)": "my-lm-v2",
    }
    for lm, name in known.items():
        assert neuronpedia.model_name(lm) == name
        assert neuronpedia.check_word("model_id", name) == name
    assert neuronpedia.set_name(HookPoint(3, "mlp_out"), "KAN", 512) == "mlp-kan-512"
    assert neuronpedia.set_name(HookPoint(3, "resid_mid"), "Curved dictionary", 9) == (
        "res-curved-dictionary-9"
    )
