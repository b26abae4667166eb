"""sparsify's folders (EleutherAI): `cfg.json` and `sae.safetensors`; TopK alone.

Its encoder has one rule, the k largest of a token, so that a head with a threshold or a gate has no
form there.
"""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from kanllama_lightning.exchange.foreign_files import (
    ANEW,
    Dims,
    from_safetensors,
    refuse_others,
    save_tensors,
    shapes_of,
    unfit,
)
from kanllama_lightning.exchange.linear_sae import LargestOfToken, LinearSAE, linear_form
from kanllama_lightning.exchange.origin import Origin, from_said
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.storage.small_files import Count, read_json, there, write_json
from kanllama_lightning.types import InputError

NAME = "sparsify"
CONFIG, WEIGHTS, ORIGIN = "cfg.json", "sae.safetensors", "origin.json"
"""Its own two files; and where ours says what they have no word for."""
WITHOUT = "delete it, and say with --lm.name and --lm.hook_point what it says"
FILES = (CONFIG, WEIGHTS, ORIGIN)

READS = {"mlp_out": "blocks.{i}.mlp.hook_in", "resid_post": "blocks.{i}.hook_resid_pre"}
"""What the module of a hook point gets, which is what a transcoder of it reads; what attention gets
is no place that one reads here."""


class SparsifyConfig(TypedDict):
    """`cfg.json`, as far as it is read."""

    d_in: Count
    k: Count
    activation: NotRequired[Literal["topk", "groupmax"]]
    num_latents: NotRequired[Count]
    transcode: NotRequired[bool]
    skip_connection: NotRequired[bool]
    signed: NotRequired[bool]
    """Of its first versions."""


def write(head: SAEHead, origin: Origin, folder: Path) -> str:
    """Write a head; returns the class that it became.

    Raises:
        InputError: The format cannot hold it, or the folder holds something else.
    """
    sae = linear_form(head)
    if not isinstance(sae.rule, LargestOfToken):
        raise InputError(
            f"{type(head).__name__}: sparsify keeps the k largest latents of each token and knows "
            "nothing else, no threshold and no gate; `--to saelens` or `--to dictionary_learning` "
            "can hold this head"
        )
    refuse_others(folder, FILES)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    save_tensors(folder / WEIGHTS, tensors)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_model),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.rule.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcoder,
        "d_in": sae.d_model,
    }
    write_json(folder / ORIGIN, origin.said())
    write_json(folder / CONFIG, config)
    return "SparseCoder"


def recognises(folder: Path) -> bool:
    """Whether a folder is one of sparsify's."""
    return there(folder / WEIGHTS)


def read(folder: Path) -> tuple[SAEHead, Origin]:
    """The SAE of a folder as a head of ours, and where it comes from.

    Its folders are called by the hook point; that counts where nothing else says it.

    Raises:
        InputError: It is damaged, or of a kind that has no head here.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    config: dict[str, Any] = read_json(path, SparsifyConfig, ANEW)
    transcoder, skip = config.get("transcode", False), config.get("skip_connection", False)
    if skip and not transcoder:
        raise unfit(path, "skip_connection=true is of a transcoder only")
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{path}: activation='groupmax': there is no head for it; topk is read")
    if config.get("signed"):
        raise InputError(
            f"{path}: signed=true: it keeps the latents of the largest size, negative ones too; "
            "there is no head for it, latents are positive here"
        )
    shape = shapes_of(weights).get("encoder.weight", ())
    if len(shape) != 2:
        raise unfit(weights, "encoder.weight is missing, or no matrix")
    m, d = shape
    if d != config["d_in"] or (config.get("num_latents") or m) != m:
        raise unfit(weights, f"encoder.weight has the shape {[m, d]}, which is not {CONFIG}'s")
    if not 1 <= config["k"] <= m:
        raise unfit(path, f"k={config['k']} must be from 1 to {m}, the number of latents")
    shapes: dict[str, Dims] = {
        "encoder.weight": (m, d), "encoder.bias": (m,), "W_dec": (m, d), "b_dec": (d,)
    }  # fmt: skip
    if skip:
        shapes["W_skip"] = (d, d)
    found = from_safetensors(weights, shapes)
    sae = LinearSAE(
        found["encoder.weight"].T,
        found["encoder.bias"],
        found["W_dec"],
        found["b_dec"],
        LargestOfToken(config["k"]),
        centred=not transcoder,
        transcoder=transcoder,
        W_skip=found["W_skip"].T if skip else None,
    )
    said = from_said(read_json(folder / ORIGIN, remedy=WITHOUT) if there(folder / ORIGIN) else None)
    said = said._replace(hook_point=said.hook_point or _named(folder))
    at = said.site
    if transcoder and said.input_point is None and at is not None and at.kind in READS:
        said = said._replace(input_point=READS[at.kind].format(i=at.layer))
    return sae.head(), said


def _named(folder: Path) -> str | None:
    """The hook point that a folder is called by."""
    name = Path(folder.absolute().name).name
    return f"model.{name}" if Origin(hook_point=name).site is not None else None
