"""Entry: `python train.py fit --config configs/kan.yaml`; the rest is in `cli.train_command`."""

import sys
from collections.abc import Sequence

from kanllama_lightning.console.stopping import answered

ESSENTIAL = (
    "kanllama_lightning.callbacks.progress.Progress",
    "kanllama_lightning.callbacks.sparsity.Sparsity",
    "kanllama_lightning.callbacks.reconstruction.Reconstruction",
    "kanllama_lightning.callbacks.spliced_loss.SplicedLoss",
    "kanllama_lightning.callbacks.baselines.Baselines",
    "kanllama_lightning.callbacks.save_head.SaveHead",
    "kanllama_lightning.callbacks.summary.Summary",
    "kanllama_lightning.callbacks.checkpoint.RunCheckpoint",
)
"""What makes a run a run, whatever a config lists; an entry of the same class gives settings."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def run() -> int:
        from kanllama_lightning.callbacks.log_config import LogConfig
        from kanllama_lightning.cli import train_command as cli

        return cli.main(args, save_config_callback=LogConfig, essential=ESSENTIAL)

    return answered(run)


if __name__ == "__main__":
    sys.exit(main())
