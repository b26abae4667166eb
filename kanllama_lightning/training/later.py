"""Numbers on their way from a GPU to the host, which are not waited for before they are needed."""

import torch
from jaxtyping import Shaped
from torch import Tensor


class Later:
    """A copy of a few numbers of a device, begun now and read later.

    Reading waits until the copy is there. A step later it is: then nothing waits.

    Args:
        numbers: On any device; on the CPU they are copied at once.
    """

    def __init__(self, numbers: Shaped[Tensor, "*shape"]) -> None:
        on_gpu = numbers.device.type == "cuda"
        self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self._copy.copy_(numbers.detach(), non_blocking=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record()

    def read(self) -> Shaped[Tensor, "*shape"]:
        """The numbers, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
