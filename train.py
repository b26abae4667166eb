"""Entry: `python train.py fit --config configs/kan.yaml`; the rest is in kanllama_lightning.cli."""

import sys
from collections.abc import Sequence

from kanllama_lightning.stopping import answered

ESSENTIAL = (
    "callbacks.progress.Progress",
    "callbacks.sparsity.Sparsity",
    "callbacks.reconstruction.Reconstruction",
    "callbacks.spliced_loss.SplicedLoss",
    "callbacks.baselines.Baselines",
    "callbacks.save_head.SaveHead",
    "callbacks.summary.Summary",
    "callbacks.checkpoint.RunCheckpoint",
)
"""What makes a run a run, whatever a config lists; an entry of the same class gives settings."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def run() -> int:
        from callbacks.log_config import LogConfig
        from kanllama_lightning import cli

        return cli.main(args, save_config_callback=LogConfig, essential=ESSENTIAL)

    return answered(run)


if __name__ == "__main__":
    sys.exit(main())
