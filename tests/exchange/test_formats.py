"""Heads in other projects' folders and back: the same latents in the same units, or one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kanllama_lightning import heads
from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.embedded import MODEL_DIR
from kanllama_lightning.exchange import dictionary_learning, saelens, sparsify
from kanllama_lightning.exchange.agreement import Agreement, agreement, made_rows
from kanllama_lightning.exchange.formats import FORMATS, format_of, read_foreign
from kanllama_lightning.exchange.linear_sae import (
    AboveThreshold,
    BehindGate,
    LargestOfToken,
    LinearSAE,
    Positive,
    linear_form,
)
from kanllama_lightning.exchange.origin import Origin, site
from kanllama_lightning.heads import SAEHead, TopK
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.lm.frozen import EMBEDDED
from kanllama_lightning.reports import evaluation
from kanllama_lightning.reports.saved_head import SavedHead, read_subject, shared_lm
from kanllama_lightning.types import InputError

D, M, K = 16, 48, 4
ORIGIN = Origin(
    lm="some/llama", hook_point="model.layers.1.mlp", ctx_len=64, text="stories", l0=float(K)
)
LINEAR = ("Standard", "Gated", "JumpReLU", "TopK", "BatchTopK", "Matryoshka", "WideBatchTopK",
          "FrozenDecoder", "FrozenEncoder", "SoftlyFrozenDecoder")  # fmt: skip
CURVED = (
    "KANEncoder",
    "SplineLatent",
    "GainLatent",
    "CurvedDictionary",
    "BentDictionary",
    "OnlyKAN",
    "MLPEncoder",
)


def trained(name: str) -> SAEHead:
    """A head whose scale, norms, thresholds and biases are none of them 0 or 1."""
    x = torch.randn(2048, D, generator=torch.Generator().manual_seed(1)) * 3 + 1
    head = getattr(heads, name)(d_model=D, d_sae=M, target_l0=K)
    head.start_(x)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if name != "Standard":  # its scale and norms differ, its latents fire on half of the tokens
        head.project_()
    head.calibrate_(x)
    head.norm_limit.fill_(100.0)
    return head.eval()


def same(one: SAEHead, other: SAEHead) -> Agreement:
    return agreement(one, other.encode, other.decode, made_rows(one, 1500))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_heads_come_back(name: str, tmp_path: Path) -> None:
    head = trained(name)
    for kind in (saelens, dictionary_learning):
        out = tmp_path / kind.NAME
        kind.write(head, ORIGIN, out)
        again, origin = read_foreign(out)
        found = same(head, again)
        assert found.holds, f"{kind.NAME}: {found}"
        assert found.l0 > 1
        # a head whose rows are not of norm 1 in the head's units would have other units
        assert float(again.scale) == pytest.approx(float(head.scale), rel=1e-5)
        assert origin.provenance() == {"lm": "some/llama", "hook_point": "blocks.1.hook_mlp_out"}


def test_topk_in_sparsify_and_no_other_head(tmp_path: Path) -> None:
    head = trained("TopK")
    out = tmp_path / "layers.1.mlp"
    sparsify.write(head, Origin(), out)
    again, origin = read_foreign(out)
    assert same(head, again).holds
    assert origin.hook_point == "model.layers.1.mlp"  # by the folder's name alone
    assert json.loads((out / "cfg.json").read_text())["k"] == K
    for name in ("BatchTopK", "Gated"):
        with pytest.raises(InputError, match="no threshold and no gate; `--to saelens`"):
            sparsify.write(trained(name), ORIGIN, tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", CURVED)
def test_curved_heads_go_to_saelens_whole(name: str, tmp_path: Path) -> None:
    head = trained(name)
    assert saelens.write(head, ORIGIN, tmp_path / "sae") == "kanllama"
    again, _ = read_foreign(tmp_path / "sae")
    x = made_rows(head, 200)
    assert torch.equal(again.encode(x), head.encode(x))
    for kind in (sparsify, dictionary_learning):
        with pytest.raises(InputError, match=r"no format of linear SAEs.*saelens_plugin"):
            kind.write(head, ORIGIN, tmp_path / "other")


def test_a_head_of_somebody_s_own_is_refused_before_it_is_written(tmp_path: Path) -> None:
    class Own(heads.KANEncoder):
        """The plug-in imports nothing that a file names."""

    head = Own(d_model=D, d_sae=M, target_l0=K)
    with pytest.raises(InputError, match="which the plug-in does not import"):
        saelens.write(head, ORIGIN, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_what_a_naive_export_gets_wrong_is_found() -> None:
    """Norms that are left where they are, and a threshold that is off by a thousandth."""
    for name, wrong in (("Standard", "W_dec"), ("BatchTopK", "threshold"), ("BatchTopK", "b_dec")):
        head, other = trained(name), trained(name)
        state = {k.rpartition(".")[2]: v for k, v in other.state_dict().items()}
        state[wrong].mul_(1.001)
        assert not same(head, other).holds, wrong


def test_a_latent_on_the_edge_is_a_matter_of_rounding() -> None:
    head = trained("BatchTopK")
    x = made_rows(head, 400, extreme=False)
    pre = head.pre_acts(x)  # type: ignore[operator]
    state = head.state_dict()
    state["selection.threshold"].copy_(pre.max())  # just not reached; by the other just reached
    other = trained("BatchTopK")
    below = torch.nextafter(pre.max(), torch.zeros(()))
    other.state_dict()["selection.threshold"].copy_(below.detach())
    found = agreement(head, other.encode, other.decode, x)
    assert (found.flips, found.rounding) == (1, 1)
    assert found.holds


def test_saelens_folder_says_where_it_is_from(tmp_path: Path) -> None:
    frequency = torch.linspace(0, 1, M)
    saelens.write(trained("BatchTopK"), ORIGIN._replace(frequency=frequency), tmp_path / "a")
    card = json.loads((tmp_path / "a" / "cfg.json").read_text())
    said = card["metadata"]
    assert card["architecture"] == "jumprelu"
    assert (said["model_name"], said["hook_name"]) == ("some/llama", "blocks.1.hook_mlp_out")
    assert (said["context_size"], said["prepend_bos"], said["dataset_path"]) == (
        64,
        True,
        "stories",
    )
    ours = said["kanllama_lightning"]
    assert ours["l0"] == K
    assert ours["spellings"] == {
        "transformer_lens": "blocks.1.hook_mlp_out",
        "transformers": "model.layers.1.mlp",
        "sparsify": "layers.1.mlp",
    }
    log10 = load_file(tmp_path / "a" / "sparsity.safetensors")["sparsity"]
    assert torch.allclose(10 ** log10.double(), frequency.double() + 1e-10, rtol=1e-5)
    # written again without: the old one is not left beside it, and a record there is no hindrance
    (tmp_path / "a" / "eval").mkdir()
    saelens.write(trained("TopK"), ORIGIN, tmp_path / "a")
    assert not (tmp_path / "a" / "sparsity.safetensors").exists()


def test_hook_points_in_every_spelling() -> None:
    for name in ("model.layers.3.mlp", "layers.3.mlp", "blocks.3.hook_mlp_out"):
        found = site(name)
        assert found is not None
        assert found.name == "blocks.3.hook_mlp_out"
    for name in (None, "", "layers", "transformer.h.3.mlp", "layers.x.mlp", "3"):
        assert site(name) is None


def test_uncalibrated_and_foreign_places_are_refused(tmp_path: Path) -> None:
    fresh = heads.BatchTopK(d_model=D, d_sae=M, target_l0=K)
    with pytest.raises(InputError, match="never calibrated"):
        saelens.write(fresh, ORIGIN, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match=r"holds thesis\.tex already"):
        saelens.write(trained("TopK"), ORIGIN, tmp_path / "b")
    (tmp_path / "c").write_text("a file")
    with pytest.raises(InputError, match="is no folder"):
        saelens.write(trained("TopK"), ORIGIN, tmp_path / "c")


RULES = (
    Positive(),
    AboveThreshold(torch.linspace(0, 0.5, 3)),
    LargestOfToken(2),
    BehindGate(torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.3, 0.0, -0.1])),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("norms", [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.5, 1.0, 3.0]])
def test_a_linear_sae_is_what_its_formula_says(rule: Any, centred: bool, norms: list[float]):
    """By hand: z by the rule of p, x_hat = z W_dec + b_dec, whatever the rows' norms."""
    generator = torch.Generator().manual_seed(3)
    W_enc, b_enc = torch.randn(2, 3, generator=generator), torch.tensor([0.1, -0.2, 0.3])
    W_dec = torch.randn(3, 2, generator=generator)
    W_dec *= (torch.tensor(norms) / W_dec.norm(dim=1)).unsqueeze(1)
    b_dec = torch.tensor([0.5, -1.0])
    x = torch.randn(300, 2, generator=generator) * 2
    p = (x - b_dec if centred else x) @ W_enc + b_enc
    match rule:
        case Positive():
            z = p.relu()
        case AboveThreshold(theta):
            z = p * (p > theta)
        case LargestOfToken(k):
            kept = p.relu().topk(k).indices
            z = torch.zeros_like(p).scatter(1, kept, p.relu().gather(1, kept))
        case BehindGate(r_mag, b_mag):
            z = (p > 0) * ((p - b_enc) * r_mag.exp() + b_mag).relu()
    head = LinearSAE(W_enc, b_enc, W_dec, b_dec, rule, centred).head()
    with torch.no_grad():
        torch.testing.assert_close(head(x).x_hat, z @ W_dec + b_dec, rtol=1e-5, atol=1e-5)
        kept_units = len(set(norms)) == 1 or isinstance(rule, LargestOfToken)
        theirs = z if kept_units else z * torch.tensor(norms)
        torch.testing.assert_close(head.encode(x), theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "temporal"}, "there is no head of that kind here; read are standard"),
        ({"architecture": "transcoder", "d_out": 7}, "reads and writes rows of one width"),
        ({"normalize_activations": "layer_norm"}, "a head takes activations as they are"),
        ({"reshape_activations": "hook_z"}, "not single attention heads"),
        ({"activation_fn": "tanh-relu"}, "only relu and topk"),
        ({"finetuning_scaling_factor": True}, "fold it into W_dec"),
        ({"d_sae": 7}, r"has the shape"),
        ({"d_in": 10**12}, r"has the shape"),
        ({"k": 0, "architecture": "topk"}, "k=0 must be from 1 to d_sae"),
        ({"architecture": "topk"}, "k is missing"),
        ({"architecture": "kanllama"}, "head_class or head_args is missing"),
        (
            {"architecture": "kanllama", "head_class": "os.system", "head_args": {}},
            "may only name classes of kanllama_lightning",
        ),
    ],
)
def test_saelens_refusals(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    saelens.write(trained("Standard"), ORIGIN, tmp_path)
    card = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=said):
        saelens.read(tmp_path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for kind in FORMATS.values():
        kind.write(trained("TopK"), ORIGIN, tmp_path / kind.NAME)
    for name, key in (("saelens", "W_enc"), ("sparsify", "encoder.bias")):
        path = next((tmp_path / name).glob("*.safetensors"))
        tensors = load_file(path)
        tensors[key].view(-1)[0] = torch.nan
        save_file(tensors, path)
        with pytest.raises(InputError, match=f"{key} holds nan"):
            read_foreign(tmp_path / name)


class Evil:
    """Would write a file if a pickle of it were opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    out = tmp_path / "dl"
    dictionary_learning.write(trained("TopK"), ORIGIN, out)
    held = torch.load(out / "ae.pt", weights_only=True)
    for said, legacy in (("holds more than tensors", False), ("a bare pickle is not", True)):
        torch.save(
            held | {"b_dec": Evil(tmp_path / "run")},
            out / "ae.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(InputError, match=said):
            read_foreign(out)
    assert not (tmp_path / "run").exists()
    # one stored number that stands for more than memory holds
    torch.save(held | {"b_dec": torch.zeros(1).expand(10**12)}, out / "ae.pt")
    with pytest.raises(InputError, match="more than the file holds"):
        read_foreign(out)


ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "no numbers": (lambda: torch.empty(D, device="meta"), "has a shape and no numbers of that"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "has a shape and no numbers of that",
    ),
    "fp8": (lambda: torch.zeros(D).to(torch.float8_e4m3fn), "holds float8_e4m3fn, not numbers of"),
    "complex": (lambda: torch.zeros(D, dtype=torch.complex64), "holds complex64, not numbers of"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_tensors_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    dictionary_learning.write(trained("TopK"), ORIGIN, tmp_path)
    held = torch.load(tmp_path / "ae.pt", weights_only=True)
    make, said = ODD[name]
    odd = make()
    torch.save(held | {"b_dec": odd}, tmp_path / "ae.pt")
    with pytest.raises(InputError, match=said):
        read_foreign(tmp_path)
    if odd.is_meta:
        torch.save(held | {"k": torch.empty((), device="meta")}, tmp_path / "ae.pt")
        with pytest.raises(InputError, match=said):
            read_foreign(tmp_path)


def test_a_file_that_is_none_is_said_to_be_none_once(tmp_path: Path) -> None:
    dictionary_learning.write(trained("TopK"), ORIGIN, tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(InputError, match="bare pickle") as caught:
        read_foreign(tmp_path)
    assert str(caught.value).count("copy the folder anew") == 1


def test_a_gain_beyond_what_a_number_can_be_is_refused(tmp_path: Path) -> None:
    """exp(r_mag) of a saved head too: latents would be infinite."""
    head = trained("Gated")
    with torch.no_grad():
        head.selection.r_mag[3] = 200.0  # type: ignore[union-attr, index]
    for kind in (saelens, dictionary_learning):
        kind.write(head, ORIGIN, tmp_path / kind.NAME)
        with pytest.raises(InputError, match=r"r_mag holds 200; 18\.4 is the most"):
            read_foreign(tmp_path / kind.NAME)
    head.save(tmp_path / "head")
    with pytest.raises(InputError, match=r"selection\.r_mag holds 200; 18\.4 is the most"):
        SAEHead.load(tmp_path / "head")


def test_signed_latents_of_sparsify_are_refused(tmp_path: Path) -> None:
    sparsify.write(trained("TopK"), ORIGIN, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"signed": False}))
    read_foreign(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"signed": True}))
    with pytest.raises(InputError, match="signed=true.*latents are positive here"):
        read_foreign(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "origin.json").write_text("")
    with pytest.raises(
        InputError, match=r"delete it, and say with --lm\.name and --lm\.hook_point"
    ):
        read_foreign(tmp_path)


# ---------------------------------------------------------------------------------------- commands


def test_an_export_that_fails_leaves_what_was_there(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it fails by; and it never takes the place of what it was made of."""

    def export(out: Path | str, *more: str, of: Path = run_folder) -> int:
        args = ["export", str(of), "--to=saelens", f"--out={out}", "--tokens=64"]
        return evaluate([*args, "--lm.untrained=true", *more])

    new = tmp_path / "a" / "b"
    assert export(new, "--text=/nowhere") == 2
    assert not (tmp_path / "a").exists()
    saelens.write(trained("TopK"), ORIGIN, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert export(tmp_path / "old", "--text=/nowhere") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert export(tmp_path / "old", of=tmp_path / "old") == 2
    assert "is what is exported; give another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "odd" / "cfg.json").mkdir(parents=True)
    for name, said in (
        ("lost", "cannot be made (File exists"),
        ("round", "cannot be made (File exists"),
        ("odd", "holds cfg.json already"),
    ):
        assert export(tmp_path / name) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "odd").iterdir()] == ["cfg.json"]
    # of one that was killed, and a name that is markup to who prints it
    (tmp_path / "[/x]" / ".part").mkdir(parents=True)
    assert export(tmp_path / "[/x]") == 0
    assert {p.name for p in (tmp_path / "[/x]").iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
    }


def test_export_and_report_of_a_run(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sae"
    args = ["export", str(run_folder), "--to=saelens", f"--out={out}", "--tokens=300"]
    assert evaluate([*args, "--lm.untrained=true"]) == 0
    said = capsys.readouterr().out
    assert "BatchTopK as jumprelu of saelens" in said
    assert "300 tokens of 'heldout'" in said
    assert "0 latents flipped" in said
    head = SAEHead.load(run_folder / "head")
    subject = read_subject(out)
    assert subject.imported
    assert subject.lm_args()["hook_point"] == "blocks.1.hook_mlp_out"
    # the same place in another spelling, so that they may be compared
    run = read_subject(run_folder)
    assert run.lm_args()["hook_point"] == "model.layers.1.mlp"
    lm = shared_lm([run, subject], {"untrained": True}, "float32")
    assert lm.hook.name == "blocks.1.hook_mlp_out"
    # and the same LM, by its name or its folder; what only one of them says is taken from it
    by_name, by_folder = (
        subject._replace(config={"lm": {"name": name, "hook_point": hook, **more}})
        for name, hook, more in (
            (EMBEDDED, "blocks.1.hook_mlp_out", {}),
            (str(MODEL_DIR), "model.layers.1.mlp", {"revision": "main"}),
        )
    )
    wide = [
        s._replace(head=TopK(d_model=128, d_sae=256, target_l0=4)) for s in (by_name, by_folder)
    ]
    assert shared_lm(wide, {}, "float32").revision == "main"
    # of ours, none is an answer too: the tokenizer's own BOS is another than the one that is named
    ours = [run._replace(config={"lm": run.lm_args() | {"bos": bos}}) for bos in (None, "<bos>")]
    with pytest.raises(InputError, match="lm.bos='<bos>', but .*on lm.bos=None"):
        shared_lm(ours, {}, "float32")
    elsewhere = subject._replace(config={"lm": run.lm_args() | {"hook_point": "model.layers.0"}})
    with pytest.raises(InputError, match=r"hook_point='model.layers.0', but .*one after the other"):
        shared_lm([run, elsewhere], {"untrained": True}, "float32")
    assert isinstance(subject.head, SAE)
    assert same(head, subject.head).holds
    # a head without its run: made activations
    again = tmp_path / "dl"
    assert evaluate(["export", str(out), "--to=dictionary_learning", f"--out={again}"]) == 0
    assert "made activations" in capsys.readouterr().out
    assert format_of(again) is dictionary_learning


def test_an_imported_head_has_the_record_of_one_of_ours(
    run_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """L0, FVU and CE with it spliced in are those of the head that was exported."""
    saelens.write(SAEHead.load(run_folder / "head"), ORIGIN, tmp_path / "sae")
    figures = []
    config = read_subject(run_folder).config["lm"]
    for folder in (tmp_path / "sae", run_folder / "head"):
        args = ["report", str(folder), "--reports", "losses", "reconstruction", "sparsity"]
        more = [f"--text={text_file}", "--documents=20", "--ctx_len=32", "--lm.untrained=true",
                f"--lm.name={config['name']}", "--lm.hook_point=model.layers.1.mlp",
                "--wandb=false"]  # fmt: skip
        assert evaluate([*args, *more]) == 0
        found = sorted((folder / "eval").rglob("summary.json"))
        figures.append(json.loads(found[0].read_text()))
    theirs, ours = figures
    keys = [k for k in ours if k.endswith(("/l0", "/fvu", "/ce_recon", "/ce_clean"))]
    assert len(keys) == 5
    for key in keys:
        assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    means = [k for k in theirs if k.endswith("/ce_mean")]
    # the mean is that of the text, not zeros
    assert abs(theirs[means[0]] - theirs[means[0].replace("mean", "zero")]) > 1e-6


@pytest.mark.parametrize("said", [None, 9.0])
def test_an_imported_head_s_sparsity_is_said_or_measured(
    said: float | None,
    run_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By which the controls of equal sparsity are made; the record names no target unless told."""
    sae, targets = tmp_path / "sae", []
    saelens.write(SAEHead.load(run_folder / "head"), ORIGIN._replace(l0=said), sae)
    start = evaluation.start_imported

    def noted(subject: SavedHead, *others: Any) -> None:
        start(subject, *others)
        targets.append(subject.head.target_l0)

    monkeypatch.setattr(evaluation, "start_imported", noted)
    lm = read_subject(run_folder).config["lm"]["name"]
    assert evaluate(["report", str(sae), "--reports", "sparsity", f"--text={text_file}",
                     "--documents=20", "--ctx_len=32", "--lm.untrained=true", f"--lm.name={lm}",
                     "--lm.hook_point=model.layers.1.mlp", "--wandb=false"]) == 0  # fmt: skip
    record = json.loads(next((sae / "eval").rglob("summary.json")).read_text())
    (l0,) = (value for key, value in record.items() if key.endswith("/l0"))
    assert record["target_l0"] == said
    assert targets == [round(l0) if said is None else 9]


def test_refused_in_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", str(run_folder), "--to=sparsify", f"--out={tmp_path / 'a'}"]
    assert evaluate(args) == 2
    said = capsys.readouterr().err
    assert "error: BatchTopK: sparsify keeps the k largest" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["Standard", "Gated", "JumpReLU", "TopK", "BatchTopK"])
def test_an_imported_head_is_the_same_at_the_scale_of_training(name: str, tmp_path: Path) -> None:
    head = trained(name)
    saelens.write(head, ORIGIN, tmp_path)
    imported, _ = read_foreign(tmp_path)
    scale = 3 * head.scale
    at = linear_form(imported).head_at(scale)
    assert at.scale == scale
    rows = made_rows(head, 500)
    assert torch.equal(at.encode(rows) != 0, imported.encode(rows) != 0)
    torch.testing.assert_close(at(rows).x_hat, imported(rows).x_hat, rtol=1e-4, atol=1e-3)
    norms = at.decoder.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
