"""SAELens' folders: `cfg.json` and `sae_weights.safetensors`, what `SAE.load_from_disk` reads.

Linear heads become `standard`, `gated`, `topk` or `jumprelu` SAEs, which load there without us.
Transcoders of them that keep what is above 0 or a threshold become its transcoders. Other heads are
written whole for the plug-in (`saelens_plugin.py`), under the architecture of ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from kanllama_lightning.exchange.foreign_files import (
    ANEW,
    Dims,
    from_safetensors,
    gains,
    refuse_others,
    save_tensors,
    shapes_of,
    unfit,
)
from kanllama_lightning.exchange.linear_sae import (
    AboveThreshold,
    BehindGate,
    LargestOfToken,
    LinearSAE,
    Positive,
    Rule,
    is_linear,
    linear_form,
)
from kanllama_lightning.exchange.origin import KEY, Origin, from_said
from kanllama_lightning.heads.head import SAEHead, built
from kanllama_lightning.storage.named import name_of
from kanllama_lightning.storage.small_files import Count, read_json, there, write_json
from kanllama_lightning.types import InputError

NAME = "saelens"
CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
FILES = (CONFIG, WEIGHTS, SPARSITY)
VERSION = "6.54.12"
"""That of SAELens whose format this is."""
OURS = "kanllama"
"""The architecture under which the plug-in is registered."""
TRANSCODED: dict[type, str] = {Positive: "", AboveThreshold: "jumprelu_"}
"""Rules that SAELens' own transcoders have, and how the names of these begin."""
LEAST = 1e-10
"""What SAELens adds to a firing frequency before it takes the logarithm."""


class SAELensConfig(TypedDict):
    """`cfg.json`, as far as it is read; versions before 6 have the metadata at the top."""

    architecture: NotRequired[str]
    d_in: Count
    d_sae: Count
    dtype: NotRequired[str]
    k: NotRequired[Count]
    rescale_acts_by_decoder_norm: NotRequired[bool]
    apply_b_dec_to_input: NotRequired[bool]
    normalize_activations: NotRequired[str | bool | None]
    reshape_activations: NotRequired[str]
    finetuning_scaling_factor: NotRequired[bool | None]
    d_out: NotRequired[Count]
    activation_fn: NotRequired[str]
    activation_fn_str: NotRequired[str]
    activation_fn_kwargs: NotRequired[dict[str, Any] | None]
    metadata: NotRequired[dict[str, Any]]
    head_class: NotRequired[str]
    head_args: NotRequired[dict[str, Any]]


def write(head: SAEHead, origin: Origin, folder: Path) -> str:
    """Write a head; returns the architecture that it became.

    Args:
        head: Any.
        origin: What is known about it.
        folder: Made if it is missing; files of an earlier export are replaced.

    Raises:
        InputError: The head has no threshold yet, or the folder holds something else.
    """
    refuse_others(folder, FILES)
    common = {
        "d_in": head.d_model,
        "d_sae": head.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _metadata(origin),
    }
    sae = linear_form(head) if is_linear(head) else None
    if sae is not None and (not sae.transcoder or type(sae.rule) in TRANSCODED):
        own, vectors = _of_rule(sae.rule)
        if not isinstance(sae.rule, BehindGate):
            vectors |= {"b_enc": sae.b_enc}
        else:
            vectors |= {"b_gate": sae.b_enc}
        own |= {"apply_b_dec_to_input": sae.centred}
        if sae.transcoder:
            skip = "" if sae.W_skip is None else "skip_"
            kind = f"{TRANSCODED[type(sae.rule)]}{skip}transcoder"
            own |= {"architecture": kind, "d_out": sae.d_model}
        if sae.W_skip is not None:
            vectors |= {"W_skip": sae.W_skip.T}
        tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec} | vectors
    elif modules := head.modules_named():
        raise InputError(
            f"{type(head).__name__}: is made of classes of {', '.join(modules)}, which the plug-in "
            "does not import; keep the folder of the head, `evaluate.py` reads it with --allow"
        )
    else:
        own = {"architecture": OURS, "head_class": name_of(type(head)),
               "head_args": head.init_args(), "apply_b_dec_to_input": False}  # fmt: skip
        tensors = dict(head.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPARSITY).unlink(missing_ok=True)  # of an earlier export
    save_tensors(folder / WEIGHTS, tensors)
    if origin.frequency is not None:
        log10 = (origin.frequency.double() + LEAST).log10().float()
        save_tensors(folder / SPARSITY, {"sparsity": log10})
    write_json(folder / CONFIG, own | common)
    return str(own["architecture"])


def _of_rule(rule: Rule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    match rule:
        case Positive():
            return {"architecture": "standard"}, {}
        case AboveThreshold(theta):
            return {"architecture": "jumprelu"}, {"threshold": theta}
        case LargestOfToken(k):
            found = {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
            return found, {}
        case BehindGate(r_mag, b_mag):
            return {"architecture": "gated"}, {"r_mag": r_mag, "b_mag": b_mag}


def _metadata(origin: Origin) -> dict[str, Any]:
    if origin.input_point is not None:
        there = origin._replace(input_point=None)
        out = _metadata(there)["hook_name"]
        return _metadata(there) | {
            "hook_name": origin.input_point, "hook_name_out": out, KEY: origin.said()
        }  # fmt: skip
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.lm,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": origin.spellings().get("transformer_lens", origin.hook_point),
        "hook_head_index": None,
        "context_size": origin.ctx_len,
        "prepend_bos": True,
        "dataset_path": origin.text,
        "exclude_special_tokens": True,
        KEY: origin.said(),
    }


# ------------------------------------------------------------------------------------------ reading


def recognises(folder: Path) -> bool:
    """Whether a folder is one of SAELens'."""
    return there(folder / WEIGHTS)


def read(folder: Path) -> tuple[SAEHead, Origin]:
    """The SAE of a folder as a head of ours, and where it comes from.

    Raises:
        InputError: It is damaged, or of an architecture that has no head here.
    """
    path = folder / CONFIG
    config: dict[str, Any] = read_json(path, SAELensConfig, ANEW)
    known = {**config, **config.get("metadata", {})}
    origin = _origin(known)
    kind = config.get("architecture", "standard")
    kwargs = config.get("activation_fn_kwargs") or {}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk" and "k" in kwargs:  # before version 6
        kind, config = "topk", config | {"k": kwargs["k"]}
    elif activation not in ("relu", "topk"):
        raise unfit(path, f"activation_fn={activation!r:.40}: only relu and topk have a head here")
    _refuse_what_has_no_head(path, config)
    if kind == OURS:
        if "head_class" not in config or "head_args" not in config:
            raise unfit(path, "head_class or head_args is missing")
        card = {"head": config["head_class"], "init_args": config["head_args"]}
        head = built(card, path, folder / WEIGHTS)
        if (head.d_model, head.d_sae) != (config["d_in"], config["d_sae"]):
            raise unfit(path, "d_in and d_sae are not those of the head")
        return head, origin
    if config.get("d_out", config["d_in"]) != config["d_in"]:
        raise InputError(
            f"{path}: d_out={config['d_out']}, d_in={config['d_in']}: a transcoder of ours reads "
            "and writes rows of one width"
        )
    if kind not in READERS:
        raise InputError(
            f"{path}: architecture={kind!r:.60}: there is no head of that kind here; read are "
            f"{', '.join((*READERS, OURS))}. A training checkpoint of SAELens becomes one of them "
            "with its `save_inference_model`"
        )
    sae = READERS[kind](folder, config)
    l0 = origin.l0
    return sae.head(None if l0 is None else round(l0)), origin


def _refuse_what_has_no_head(path: Path, config: dict[str, Any]) -> None:
    normalised = config.get("normalize_activations") or "none"
    if normalised != "none":
        raise InputError(
            f"{path}: normalize_activations={normalised!r:.40}: a head takes activations as they "
            "are; fold it into the weights with SAELens where it has a constant factor "
            "(`sae.fold_activation_norm_scaling_factor(factor)`), else there is no head for it"
        )
    if config.get("reshape_activations", "none") != "none":
        raise InputError(
            f"{path}: reshape_activations={config['reshape_activations']!r:.40}: heads read the "
            "residual stream, attention output and MLP output, not single attention heads"
        )
    if config.get("finetuning_scaling_factor"):
        raise InputError(
            f"{path}: finetuning_scaling_factor=true: there is no head with a factor per latent; "
            "fold it into W_dec"
        )


def _dense(
    folder: Path, config: dict[str, Any], more: dict[str, Dims]
) -> tuple[dict[str, Tensor], bool]:
    """The tensors that all architectures have, and more; and whether b_dec is taken off."""
    d, m = config["d_in"], config["d_sae"]
    path = folder / WEIGHTS
    wanted: dict[str, Dims] = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), **more}
    if "scaling_factor" in shapes_of(path):  # ones, where it is not used
        wanted["scaling_factor"] = (m,)
    found = from_safetensors(path, wanted)
    if not bool((found.pop("scaling_factor", torch.ones(())) == 1).all()):
        raise unfit(path, "scaling_factor is not 1: there is no head with a factor per latent")
    return found, config.get("apply_b_dec_to_input", True)


def _sae(found: dict[str, Tensor], bias: str, rule: Rule, centred: bool) -> LinearSAE:
    return LinearSAE(found["W_enc"], found[bias], found["W_dec"], found["b_dec"], rule, centred)


def _standard(folder: Path, config: dict[str, Any]) -> LinearSAE:
    found, centred = _dense(folder, config, {"b_enc": (config["d_sae"],)})
    return _sae(found, "b_enc", Positive(), centred)


def _transcoder(folder: Path, config: dict[str, Any]) -> LinearSAE:
    kind, d, m = config["architecture"], config["d_in"], config["d_sae"]
    more: dict[str, Dims] = {"b_enc": (m,)}
    if "skip_" in kind:
        more["W_skip"] = (d, d)
    if kind.startswith("jumprelu"):
        more["threshold"] = (m,)
    found, _ = _dense(folder, config, more)
    rule: Rule = Positive()
    if "threshold" in found:
        rule = AboveThreshold(found["threshold"].clamp_min(0))
    sae = _sae(found, "b_enc", rule, centred=False)
    skip = found.get("W_skip")
    return sae._replace(transcoder=True, W_skip=None if skip is None else skip.T)


def _jumprelu(folder: Path, config: dict[str, Any]) -> LinearSAE:
    m = (config["d_sae"],)
    found, centred = _dense(folder, config, {"b_enc": m, "threshold": m})
    # their ReLU comes first: a negative threshold is one of 0
    return _sae(found, "b_enc", AboveThreshold(found["threshold"].clamp_min(0)), centred)


def _gated(folder: Path, config: dict[str, Any]) -> LinearSAE:
    m = (config["d_sae"],)
    found, centred = _dense(folder, config, {"b_gate": m, "b_mag": m, "r_mag": m})
    rule = BehindGate(gains(folder / WEIGHTS, found["r_mag"]), found["b_mag"])
    return _sae(found, "b_gate", rule, centred)


def _topk(folder: Path, config: dict[str, Any]) -> LinearSAE:
    k = config.get("k")
    if k is None:
        raise unfit(folder / CONFIG, "k is missing, the number of latents that a token keeps")
    if not (type(k) is int and 1 <= k <= config["d_sae"]):
        raise unfit(folder / CONFIG, f"k={k!r:.40} must be from 1 to d_sae={config['d_sae']}")
    found, centred = _dense(folder, config, {"b_enc": (config["d_sae"],)})
    sae = _sae(found, "b_enc", LargestOfToken(k), centred)
    return sae.with_unit_rows() if config.get("rescale_acts_by_decoder_norm") else sae


READERS: dict[str, Callable[[Path, dict[str, Any]], LinearSAE]] = {
    "standard": _standard,
    "gated": _gated,
    "topk": _topk,
    "jumprelu": _jumprelu,
    "transcoder": _transcoder,
    "skip_transcoder": _transcoder,
    "jumprelu_transcoder": _transcoder,
    "jumprelu_skip_transcoder": _transcoder,
}
"""By architecture."""


def _origin(known: dict[str, Any]) -> Origin:
    own = from_said(known.get(KEY))
    texts = {k: v for k, v in known.items() if isinstance(v, str) and v}
    length, out = known.get("context_size"), texts.get("hook_name_out")
    return own._replace(
        lm=own.lm or texts.get("model_name"),
        hook_point=own.hook_point or out or texts.get("hook_name") or texts.get("hook_point"),
        input_point=own.input_point or (texts.get("hook_name") if out else None),
        text=own.text or texts.get("dataset_path"),
        ctx_len=own.ctx_len or (length if type(length) is int else None),
    )
