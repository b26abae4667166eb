"""dictionary_learning's folders: `config.json` and `ae.pt`, what its `load_dictionary` reads.

`ae.pt` is a file of `torch.save`; it is read with `weights_only`, which runs nothing in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from kanllama_lightning.exchange.foreign_files import (
    ANEW,
    Dims,
    chosen,
    from_torch,
    gains,
    refuse_others,
    unfit,
)
from kanllama_lightning.exchange.linear_sae import (
    AboveThreshold,
    BehindGate,
    LargestOfToken,
    LinearSAE,
    Positive,
    linear_form,
)
from kanllama_lightning.exchange.origin import KEY, Origin, from_said
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.small_files import Count, read_json, there, write_json
from kanllama_lightning.types import InputError

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)
PLACES = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attention_out"}
"""Its words for hook points."""
Tensors = dict[str, Tensor]


class DictionaryTrainer(TypedDict):
    """`trainer` of `config.json`, as far as it is read."""

    dict_class: str
    k: NotRequired[Count]
    lm_name: NotRequired[str | None]
    layer: NotRequired[int | None]
    submodule_name: NotRequired[str | None]


class DictionaryConfig(TypedDict):
    """`config.json`, as far as it is read."""

    trainer: DictionaryTrainer


def write(head: SAEHead, origin: Origin, folder: Path) -> str:
    """Write a head; returns the class that it became.

    Raises:
        InputError: The format cannot hold it, or the folder holds something else.
    """
    sae = linear_form(head)
    if sae.transcoder:
        raise InputError(
            f"{type(head).__name__}: dictionary_learning has no folder for a transcoder; `--to "
            "saelens` and `--to sparsify` have"
        )
    refuse_others(folder, FILES)
    name, own, tensors = _as_theirs(sae, getattr(head, "target_l0", 1))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as part:
        torch.save({k: v.cpu().clone().contiguous() for k, v in tensors.items()}, part)
    at = origin.site
    trainer = own | {
        "dict_class": name,
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
        "layer": None if at is None else at.layer,
        "lm_name": origin.lm,
        "submodule_name": None
        if at is None
        else f"{PLACES.get(at.kind, at.kind)}_layer_{at.layer}",
    }
    buffer = {"d_submodule": sae.d_model, "io": "out", "ctx_len": origin.ctx_len}
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": buffer, KEY: origin.said()})
    return name


def _as_theirs(sae: LinearSAE, l0: int) -> tuple[str, dict[str, Any], Tensors]:
    """Class, arguments and tensors."""
    layers = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    match sae.rule:
        case Positive():
            flat = sae.reading(False)
            biases = {"encoder.bias": flat.b_enc, "decoder.bias": flat.b_dec}
            return "AutoEncoderNew", {}, layers | biases
        case BehindGate(r_mag, b_mag):
            own = sae.reading(True)
            biases = {"gate_bias": own.b_enc, "mag_bias": b_mag, "decoder_bias": own.b_dec}
            return "GatedAutoEncoder", {}, layers | biases | {"r_mag": r_mag}
        case LargestOfToken(k):
            own = sae.reading(True)
            numbers = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            biases = {"encoder.bias": own.b_enc, "b_dec": own.b_dec}
            return "AutoEncoderTopK", {"k": k}, layers | biases | numbers
        case AboveThreshold(theta) if bool((theta == theta[0]).all()):
            own = sae.reading(True)
            numbers = {"k": torch.tensor(l0, dtype=torch.int), "threshold": theta[0]}
            biases = {"encoder.bias": own.b_enc, "b_dec": own.b_dec}
            return "BatchTopKSAE", {"k": l0}, layers | biases | numbers
        case AboveThreshold(theta):
            flat = sae.reading(False)  # as its loader does not restore `apply_b_dec_to_input`
            tensors = {"W_enc": flat.W_enc, "b_enc": flat.b_enc, "threshold": theta}
            return "JumpReluAutoEncoder", {}, tensors | {"W_dec": flat.W_dec, "b_dec": flat.b_dec}


# ------------------------------------------------------------------------------------------ reading


def recognises(folder: Path) -> bool:
    """Whether a folder is one of dictionary_learning's."""
    return there(folder / WEIGHTS)


def read(folder: Path) -> tuple[SAEHead, Origin]:
    """The dictionary of a folder as a head of ours, and where it comes from.

    Raises:
        InputError: It is damaged, or of a class that has no head here.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    config: dict[str, Any] = read_json(path, DictionaryConfig, ANEW)
    trainer = config["trainer"]
    name = trainer["dict_class"]
    if name not in READERS:
        raise InputError(
            f"{path}: trainer.dict_class={name!r:.60}: there is no head of that kind here; read "
            f"are {', '.join(READERS)}"
        )
    sae = READERS[name](weights, from_torch(weights))
    said = from_said(config.get(KEY))
    origin = said._replace(
        lm=said.lm or trainer.get("lm_name") or None,
        hook_point=said.hook_point or _hook_point(trainer),
    )
    k = trainer.get("k")
    return sae.head(k), origin


def _hook_point(trainer: dict[str, Any]) -> str | None:
    name, layer = trainer.get("submodule_name") or "", trainer.get("layer")
    kind = next((ours for ours, theirs in PLACES.items() if name.startswith(theirs)), None)
    return None if kind is None or layer is None or layer < 0 else f"blocks.{layer}.hook_{kind}"


def _sides(path: Path, held: Tensors, encoder: str, turned: bool) -> tuple[int, int]:
    """d_model and d_sae, by the shape of the encoder."""
    shape = tuple(held[encoder].shape) if encoder in held else ()
    if len(shape) != 2:
        raise unfit(path, f"{encoder} is missing, or no matrix")
    return (shape[1], shape[0]) if turned else (shape[0], shape[1])


def _layers(path: Path, held: Tensors, more: Callable[[int, int], dict[str, Dims]]) -> Tensors:
    """Tensors of a class with two `nn.Linear`s."""
    d, m = _sides(path, held, "encoder.weight", True)
    wanted = {"encoder.weight": (m, d), "decoder.weight": (d, m), **more(d, m)}
    return chosen(path, held, wanted)


def _linear(found: Tensors, b_enc: str, b_dec: str, rule: Any, centred: bool) -> LinearSAE:
    encoder, decoder = found["encoder.weight"].T, found["decoder.weight"].T
    return LinearSAE(encoder, found[b_enc], decoder, found[b_dec], rule, centred)


def _autoencoder(path: Path, held: Tensors) -> LinearSAE:
    found = _layers(path, held, lambda d, m: {"encoder.bias": (m,), "bias": (d,)})
    return _linear(found, "encoder.bias", "bias", Positive(), True)


def _autoencoder_new(path: Path, held: Tensors) -> LinearSAE:
    found = _layers(path, held, lambda d, m: {"encoder.bias": (m,), "decoder.bias": (d,)})
    return _linear(found, "encoder.bias", "decoder.bias", Positive(), False)


def _gated(path: Path, held: Tensors) -> LinearSAE:
    found = _layers(path, held, lambda d, m: {
        "decoder_bias": (d,), "r_mag": (m,), "gate_bias": (m,), "mag_bias": (m,)})  # fmt: skip
    rule = BehindGate(gains(path, found["r_mag"]), found["mag_bias"])
    return _linear(found, "gate_bias", "decoder_bias", rule, True)


def _number(path: Path, held: Tensors, name: str) -> float:
    """Takes a number out of the tensors."""
    one = held.pop(name, None)
    if one is None or one.numel() != 1 or one.is_complex():
        raise unfit(path, f"{name} is missing, or not one number")
    value = float(one)
    if not abs(value) < 1e8:
        raise unfit(path, f"{name}={value} is no finite number")
    return value


def _topk(path: Path, held: Tensors) -> LinearSAE:
    held = dict(held)
    k = _number(path, held, "k")
    held.pop("threshold", None)  # not used at inference, unless it is asked for
    found = _layers(path, held, lambda d, m: {"encoder.bias": (m,), "b_dec": (d,)})
    m = len(found["encoder.bias"])
    if not (k == int(k) and 1 <= k <= m):
        raise unfit(path, f"k={k:g} must be a whole number from 1 to {m}, the number of latents")
    return _linear(found, "encoder.bias", "b_dec", LargestOfToken(int(k)), True)


def _batch_topk(path: Path, held: Tensors) -> LinearSAE:
    held = dict(held)
    _number(path, held, "k")
    theta = _number(path, held, "threshold")
    found = _layers(path, held, lambda d, m: {"encoder.bias": (m,), "b_dec": (d,)})
    # one that was never set is -1, and keeps all that is positive
    rule = AboveThreshold(torch.full_like(found["encoder.bias"], max(theta, 0.0)))
    return _linear(found, "encoder.bias", "b_dec", rule, True)


def _matrices(path: Path, held: Tensors, more: Callable[[int], dict[str, Dims]]) -> Tensors:
    d, m = _sides(path, held, "W_enc", False)
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,), **more(m)}
    return chosen(path, held, shapes)


def _matryoshka(path: Path, held: Tensors) -> LinearSAE:
    held = dict(held)
    _number(path, held, "k")
    theta = _number(path, held, "threshold")
    held.pop("group_sizes", None)  # all groups are active
    found = _matrices(path, held, lambda _: {})
    rule = AboveThreshold(torch.full_like(found["b_enc"], max(theta, 0.0)))
    return LinearSAE(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], rule, True)


def _jumprelu(path: Path, held: Tensors) -> LinearSAE:
    found = _matrices(path, held, lambda m: {"threshold": (m,)})
    rule = AboveThreshold(found["threshold"].clamp_min(0))
    return LinearSAE(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], rule, False)


READERS: dict[str, Callable[[Path, Tensors], LinearSAE]] = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _autoencoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}
"""By class."""
