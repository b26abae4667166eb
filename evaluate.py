"""Entry: `python evaluate.py report RUN`; the rest is in kanllama_lightning.reports.cli."""

import sys

from kanllama_lightning.reports.cli import main

if __name__ == "__main__":
    sys.exit(main())
