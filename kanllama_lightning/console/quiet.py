"""What a command leaves unsaid: lines of libraries that a person cannot use."""

import logging
import os
import warnings

import transformers

NOISE = (
    r".*LightningCLI's args parameter is intended.*",
    r".*`broadcast_buffers` is deprecated.*",
    r".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are summed by torchmetrics
    r".*You are using the `dataloader_iter` step flavor.*",
    r".*Found `dataloader_iter` argument.*",
    r".*does not have many workers.*",
    r".*litlogger.*",
    r".*is smaller than the logging interval.*",
    r".*LeafSpec.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)`.*",
    r".*Trying to infer the `batch_size`.*",
    r".*You are using a CUDA device.*",
)


def is_first() -> bool:
    """Whether this process speaks for all that train together."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def quiet() -> None:
    """Our own lines plain; of the libraries' only what a person can use."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("kanllama_lightning",):
        logging.getLogger(name).setLevel(logging.INFO if is_first() else logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
