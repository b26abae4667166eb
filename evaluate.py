"""Entry: `python evaluate.py report RUN`; the rest is in `cli.evaluate_command`."""

import sys

from kanllama_lightning.console.stopping import answered


def main() -> int:
    """Run the command line; returns the exit code."""
    from kanllama_lightning.cli import evaluate_command as cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(answered(main))
