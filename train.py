"""Entry: `python train.py fit --config configs/kan.yaml`; the rest is in kanllama_lightning.cli."""

import sys
from collections.abc import Sequence

from kanllama_lightning.stopping import answered


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def run() -> int:
        from callbacks.log_config import LogConfig
        from kanllama_lightning import cli

        return cli.main(args, save_config_callback=LogConfig)

    return answered(run)


if __name__ == "__main__":
    sys.exit(main())
