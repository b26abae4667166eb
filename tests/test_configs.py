"""Every shipped YAML parses against the real signatures and says what it is for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from kanllama_lightning import heads
from kanllama_lightning.cli import train_command as cli
from kanllama_lightning.cli.arguments import meant
from kanllama_lightning.cli.command_line import BASE
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FETCHED
from kanllama_lightning.storage.named import current_path
from tests.conftest import rest_slow
from train import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = {"base", "embedded", "multi_gpu", "smollm2"}
HEAD_CONFIGS = [c for c in CONFIGS if c.stem not in OVERLAYS]
SEVERAL = {"side_by_side", "kan_and_batch_topk"}
SOME = [c for c in HEAD_CONFIGS if c.stem in ("kan", "side_by_side")]


class Parsed(Exception):  # noqa: N818
    """Parsing is done; nothing is built."""


def parse(monkeypatch: pytest.MonkeyPatch, *configs: Path, also: Sequence[str] = ()) -> Any:
    """The resolved configuration of a `fit`, with further arguments."""

    def stop(self: cli.KanllamaCLI) -> None:
        raise Parsed(self.config["fit"])

    monkeypatch.setattr(cli.KanllamaCLI, "before_instantiate_classes", stop)
    with pytest.raises(Parsed) as parsed:
        main(["fit", *(a for c in configs for a in ("--config", str(c))), *also])
    return parsed.value.args[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_says_what_it_is_for(config: Path) -> None:
    assert config.read_text().startswith("# ")


@pytest.mark.parametrize("config", rest_slow(HEAD_CONFIGS, SOME), ids=lambda c: c.stem)
def test_is_a_complete_run_on_the_real_target_or_on_the_embedded_model(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = parse(monkeypatch, config)
    own = parsed.model.head.class_path
    assert parsed.lm.name == "meta-llama/Llama-3.2-1B"
    assert parsed.lm.hook_point == "model.layers.0.mlp"
    assert len(parsed.lm.revision) == 40
    assert parsed.model.head.init_args.d_sae is None, "8 times the width"
    assert parsed.model.head.init_args.target_l0 == 64
    assert parsed.model.tokens == 300_000_000
    assert parsed.data.ctx_len == 512
    assert parsed.data.train.init_args.name == "roneneldan/TinyStories"
    assert parsed.data.val[0].init_args.sample_seed == 42
    # with the overlay nothing is left to download
    parsed = parse(monkeypatch, config, ROOT / "configs" / "embedded.yaml")
    assert parsed.lm.name == "embedded"
    assert parsed.lm.revision is None
    assert parsed.data.val is None
    assert "StoryWorldCorpus" in parsed.data.train.class_path
    assert parsed.model.head.class_path == own, "the overlay keeps the head"
    parsed = parse(monkeypatch, config, ROOT / "configs" / "smollm2.yaml")
    assert parsed.lm.name == FETCHED
    assert parsed.model.head.class_path == own
    assert parsed.model.head.init_args.target_l0 == 32
    assert parsed.data.train.init_args.part == "train"
    assert parsed.data.val.init_args.part == "validation"


WHOLE = ("kan", "jump_relu", "only_kan", "dense_kan_relu", "side_by_side")
"""One of each way of training; what the others compute is in tests/golden."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [c for c in HEAD_CONFIGS if c.stem in WHOLE], ids=lambda c: c.stem
)
def test_runs_on_the_embedded_model(config: Path, tmp_path: Path) -> None:
    """`train.py fit --config configs/HEAD.yaml --config configs/embedded.yaml`, cut short."""
    cut = {
        "model.tokens": 8192,
        "model.start_tokens": 8192,
        "model.buffer.capacity_tokens": 8192,
        "data.val_tokens": 8192,
        "run": tmp_path / "run",
        "trainer.logger": "false",
    }
    configs = ["--config", str(config), "--config", str(ROOT / "configs" / "embedded.yaml")]
    assert main(["fit", *configs, *(f"--{k}={v}" for k, v in cut.items())]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    for name in summary.get("heads", [""]):
        own = json.loads((tmp_path / "run" / name / "summary.json").read_text())
        assert math.isfinite(own["val/fvu"])  # four steps have not learned much
        SAEHead.load(tmp_path / "run" / name / "head")


@pytest.mark.slow
def test_every_trainable_head_has_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    single = [c for c in HEAD_CONFIGS if c.stem not in SEVERAL]
    configured = {parse(monkeypatch, c).model.head.class_path for c in single}
    known = {
        f"{h.__module__}.{h.__qualname__}"
        for h in (getattr(heads, name) for name in heads.__all__)
        if h not in (SAEHead, heads.PCA, heads.LinearMap)
    }
    assert {c.rsplit(".", 1)[-1] for c in configured} == {k.rsplit(".", 1)[-1] for k in known}


def test_later_config_keeps_shared_arguments_and_drops_foreign_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("model: {head: {class_path: KANEncoder, init_args: {d_hidden: 99}}}\n")
    other = tmp_path / "other.yaml"
    other.write_text("model: {head: {class_path: TopK}}\n")
    head = parse(monkeypatch, ROOT / "configs" / "kan.yaml", extra, other).model.head
    assert head.class_path.endswith("TopK")
    assert head.init_args.target_l0 == 64
    assert "d_hidden" not in head.init_args


def test_base_callbacks_exist() -> None:
    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    for entry in base["trainer"]["callbacks"]:
        module, _, name = entry["class_path"].rpartition(".")
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), name


OF_ONE_FILE = {
    "prose": "w1 of somebody's diary\nw2 of the same\n",
    "a line": "w1",
    "records": '{"text": "w1"}\n{"text": "w2"}\n',
    "a record": '{"text": "w1"}\n',
    "a class": '{"class_path": "StoryWorldCorpus"}',
    "a list": '["w1", "w2"]',
    "null": "null",
    "empty": "",
}


@pytest.mark.parametrize(
    ("form", "content"),
    [
        *(("argument", content) for content in OF_ONE_FILE.values()),
        *(("config", OF_ONE_FILE[name]) for name in ("prose", "a class")),
    ],
)
def test_a_file_of_text_is_named_and_not_read_as_a_configuration(
    content: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in it would be looked up on the hub: somebody's text, as a name."""
    text, config = tmp_path / "text.jsonl", tmp_path / "own.yaml"
    text.write_text(content)
    config.write_text(f"data: {{train: {text}, val: {text}}}\n")
    base = ROOT / "configs" / "kan.yaml"
    if form == "config":
        data = parse(monkeypatch, base, config).data
    else:
        data = parse(monkeypatch, base, also=[f"--data.train={text}", "--data.val", str(text)]).data
    assert (data.train, data.val) == (str(text), str(text))


def test_validation_text_is_one_corpus_or_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1\nw2\n")
    own = json.dumps({"class_path": "LocalCorpus", "init_args": {"path": str(text)}})
    mixed = json.dumps(
        {
            "class_path": "Mixture",
            "init_args": {"corpora": [str(text), json.loads(own)], "weights": [1, 2]},
        }
    )

    def val(*given: str) -> Any:
        return parse(monkeypatch, ROOT / "configs" / "kan.yaml", also=given).data.val

    assert val("--data.val=null") is None
    assert val(f"--data.val=[{text}]") == [str(text)]
    assert val(f"--data.val={own}").init_args.path == str(text)
    assert val("--data.val=LocalCorpus", f"--data.val.path={text}").init_args.path == str(text)
    assert val(f"--data.val={mixed}").init_args.corpora[0] == str(text)
    first, second = val(f"--data.val=[{text}, {own}]")
    assert (first, second.init_args.path) == (str(text), str(text))
    assert val(f"--data.val+={text}")[1:] == [str(text)], "beside the default's"


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    """By their paths, or by their names, one after another; a file that is there comes first."""
    monkeypatch.chdir(tmp_path)
    shipped = [str(BASE.parent / "kan.yaml"), str(BASE.parent / "embedded.yaml")]
    for given in (
        ["--config", "configs/kan.yaml", "--config=configs/embedded.yaml"],
        ["--config", "kan", "embedded"],
        ["--config=kan,embedded"],
        ["-c", "kan.yaml", "--config", "Configs/embedded".lower()],
    ):
        assert meant(["fit", *given]).files == shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "kan.yaml").write_text("model: {head: {class_path: TopK}}")
    assert meant(["fit", *given]).files == shipped
    assert meant(["fit", "--config", "configs/kan.yaml"]).head["class_path"] == "TopK"


def test_classes_are_found_where_earlier_configurations_have_them(tmp_path, monkeypatch):
    earlier = {
        "model": {"optimizer": {"class_path": "kanllama_lightning.optim.Adam"}},
        "trainer": {"callbacks": [{"class_path": "callbacks.logit_lens.LogitLens"}]},
    }
    path = tmp_path / "earlier.yaml"
    path.write_text(yaml.safe_dump(earlier))
    also = [f"--config={path}", "--trainer.logger=kanllama_lightning.wandb_logger.RunLogger"]
    parsed = parse(monkeypatch, ROOT / "configs" / "kan.yaml", also=also)
    assert parsed.model.optimizer.class_path == "kanllama_lightning.training.optim.Adam"
    assert parsed.trainer.logger.class_path == "kanllama_lightning.runs.wandb_logger.RunLogger"
    assert current_path("callbacks.jsonl") == "callbacks.jsonl", "a file of that name"
    (callback,) = parsed.trainer.callbacks
    assert callback.class_path == "kanllama_lightning.callbacks.logit_lens.LogitLens"
