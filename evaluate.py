"""Entry: `python evaluate.py report RUN`; the rest is in kanllama_lightning.reports.cli."""

import sys

from kanllama_lightning.stopping import answered


def main() -> int:
    """Run the command line; returns the exit code."""
    from kanllama_lightning.reports import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(answered(main))
