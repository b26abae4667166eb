"""Entry: `python train.py fit --config configs/kan.yaml`; see `kanllama_lightning/cli/main.py`."""

import sys

from kanllama_lightning.cli.main import train as main

if __name__ == "__main__":
    sys.exit(main())
