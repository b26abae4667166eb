"""How well single latents tell the known facts of the story world, as training goes on."""

from typing import Any

import lightning as L

from kanllama_lightning.callbacks.looking import LookingCallback
from kanllama_lightning.functional.sinks import regular
from kanllama_lightning.lm.frozen import EMBEDDED
from kanllama_lightning.measures.concept_matching import Stories, codes_of, read_stories, recover
from kanllama_lightning.runs.folder import prefixed
from kanllama_lightning.types import InputError

FIGURES = {"recovered": "recovered_frac", "f1": "mean_f1", "auroc": "mean_auroc"}


class Concepts(LookingCallback):
    """On the embedded model, facts told by latents; on any other LM it does nothing at all.

    Logs `val/concepts_recovered` (share of facts with F1 of at least 0.9), `val/concepts_f1` and
    `val/concepts_auroc` (means over facts). Latent and threshold of each fact are chosen on one
    half of the stories and judged on the other; with fewer stories than the report `concepts`
    reads, fewer facts count. A look takes about two seconds on one core for 1,024 latents.

    Args:
        every_n_validations: Validations from one look to the next; the final one always looks.
        stories: Number of stories, half of them to choose by; of a seed that training does not use.
    """

    def __init__(self, every_n_validations: int = 5, stories: int = 200) -> None:
        super().__init__(every_n_validations)
        if stories < 2:
            raise InputError(f"Concepts.stories={stories}: must be at least 2, one for each half")
        self.stories = stories
        self._read: Stories | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Match and log; the stories are read once, as the LM is frozen."""
        if not self.looks or pl_module.lm.name != EMBEDDED:
            return
        if self._read is None:
            self._read = read_stories(pl_module.lm, self.stories)
        kept = self._read.only(
            regular(pl_module.head.target(self._read.x), pl_module.head.norm_limit).cpu()
        )
        choose, test = kept.halves()
        for name, head in pl_module.heads().items():
            codes = [codes_of(head, half.x) for half in (choose, test)]
            found = recover(codes[0], choose.facts, codes[1], test.facts).figures()
            logged = {f"val/concepts_{n}": found[key] for n, key in FIGURES.items() if key in found}
            pl_module.log_dict(prefixed(name, logged) | {"tokens": float(pl_module.tokens_seen)})
