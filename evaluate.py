"""Entry: `python evaluate.py report RUN`; see `kanllama_lightning/cli/main.py`."""

import sys

from kanllama_lightning.cli.main import evaluate as main

if __name__ == "__main__":
    sys.exit(main())
