"""`evaluate.py export --to neuronpedia`: pages of a head's latents in a folder; nothing is sent."""

from functools import partial
from pathlib import Path

from jsonargparse import Namespace

from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.corpus.hub import HubCorpus
from kanllama_lightning.exchange import neuronpedia
from kanllama_lightning.exchange.neuronpedia import PageSource
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import check_forward
from kanllama_lightning.reports.evaluation import (
    EvalSettings,
    device_named,
    rows_at_once,
    start_imported,
    token_rows,
)
from kanllama_lightning.reports.neuronpedia_pages import known_of, look, pages
from kanllama_lightning.reports.saved_head import SavedHead, shared_lm
from kanllama_lightning.reports.token_sets import batches


def write_pages(subject: SavedHead, given: Namespace, how: EvalSettings) -> None:
    """Write the pages of a head's latents for Neuronpedia.

    Args:
        subject: The head.
        given: The options of the command.
        how: On which text, where.

    Raises:
        InputError: There is no text, a name that the site does not take, or nothing to show.
    """
    lm = shared_lm([subject], how.lm, how.dtype)
    out = Path(given.out)
    model, group = given.model_id, given.sae_set
    if model is None:
        model = neuronpedia.model_name(lm.name)
    if group is None:
        group = neuronpedia.set_name(lm.hook, subject.head.title, subject.head.d_sae)
    neuronpedia.check_word("model_id", model)
    neuronpedia.check_word("sae_set", group)
    neuronpedia.check_folder(out)
    text, rows = next(iter(token_rows(subject, lm, how).items()))
    n, length = rows.ids.shape
    rows = rows.pick(slice(n if given.tokens is None else -(-given.tokens // length)))
    device = device_named(how.device)
    lm.load_(device)
    head = subject.head.to(device)
    seqs = how.batch_seqs or rows_at_once(lm, length, device)
    check_forward(lm, next(batches(rows, seqs)).to(device))
    if subject.imported:
        start_imported(subject, lm, rows, seqs)
    looked = look(head, lm, rows, text, seqs)
    source = PageSource(
        model=model,
        set_name=group,
        layer=lm.hook.layer,
        about=_about(lm, model),
        prompts=len(rows.ids),
        prompt_tokens=length,
        text=text if how.text is not None else _trained_on(subject, lm),
        title=f"{head.title}, {head.d_sae:,} latents at {lm.hook.name} of {lm.name}",
        notes=_notes(head.title, lm, float(head.scale), int(looked.contexts.meter.n)),
        sha256=subject.sha256,
    )
    made = neuronpedia.write(pages(looked, lm, known_of(subject, lm)), source, out)
    say = partial(terminal(highlight=False).print, soft_wrap=True)
    say(
        f"Written: {out}, pages of {made.latents:,} latents of {head.title} ({made.alive:,} fired, "
        f"{made.contexts:,} contexts, {made.explained:,} explanations), over "
        f"{int(looked.contexts.meter.n):,} tokens of {text!r}\n"
        f"  {neuronpedia.BATCHES}/  for SAEDashboard's converter\n"
        f"  {neuronpedia.TABLES}/{model}/{source.name}/  for Neuronpedia's importer\n"
        "Nothing was sent anywhere (docs/neuronpedia.md)."
    )
    if not made.explained:
        say(
            "No explanations: `evaluate.py report RUN --reports interpretability` makes them, and "
            "the same export again takes them in"
        )


def _trained_on(subject: SavedHead, lm: FrozenLM) -> str:
    """Name of the corpus that a run was trained on; of one on the hub, with its owner."""
    data = subject.data(lm.tokenizer)
    assert data is not None  # or there were no rows
    corpus = data.train_corpus
    return corpus.dataset if isinstance(corpus, HubCorpus) else corpus.name


def _about(lm: FrozenLM, model: str) -> dict[str, str | int]:
    """The LM as the site lists it."""
    name = Path(lm.name).name
    from_hub = "/" in lm.name and not Path(lm.name).exists()
    return {
        "displayName": name,
        "displayNameShort": name,
        "owner": lm.name.partition("/")[0] if from_hub else "local",
        "layers": int(lm.config.num_hidden_layers),
        "neuronsPerLayer": int(lm.config.intermediate_size),
        "dimension": lm.d_model,
        "instruct": model.endswith("-it"),
    }


def _notes(title: str, lm: FrozenLM, scale: float, tokens: int) -> str:
    """What the fields do not say."""
    return (
        f"{title} at {lm.hook.name}, over {tokens:,} tokens; BOS, other special tokens and "
        "attention sinks are not counted or shown. Activations are in the units of the head: "
        f"those of the language model times {scale:.6g}. Logits are the direct path of the "
        "latent's direction through the final norm's gain and the unembedding. "
        "Made with kanllama_lightning."
    )
