"""An end for training text that yields nothing to train on, which would be read for ever."""

from jaxtyping import Int
from torch import Tensor

from kanllama_lightning.types import InputError


class Drought:
    """Notices that a whole pass over the text has given no usable activation."""

    def __init__(self) -> None:
        self._since: tuple[int, ...] | None = None
        self._read = 0

    def check(self, read: int, usable: int, position: Int[Tensor, " 3"]) -> None:
        """Take note of a batch.

        Args:
            read: Activations of real text in it.
            usable: Those of them that are no sinks.
            position: (epoch, block, row) behind it.

        Raises:
            InputError: No batch of a whole pass had a usable one; says what it had instead.
        """
        if usable:
            self._since, self._read = None, 0
            return
        now = tuple(position.tolist())
        self._read += read
        if self._since is None:
            self._since = now
        epoch, *place = self._since
        if now < (epoch + 1, *place):  # text behind the first empty batch is still unread
            return
        if self._read:
            raise InputError(
                f"data.train: a whole pass over the text gave no activation to train on: all "
                f"{self._read:,} are longer than the sink limit (10 times the median of the start "
                "sample), or are no numbers; see that lm.name, lm.dtype and lm.hook_point are "
                "those that the run began with"
            )
        raise InputError(
            "data.train: a whole pass over the text gave no token to train on: it holds special "
            "tokens alone (BOS, EOS, padding, unknown words), or documents that are empty for this "
            "tokenizer; give other text, or another column of it"
        )
