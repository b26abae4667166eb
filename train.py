"""Entry: `python train.py fit --config configs/kan.yaml`; the rest is in kanllama_lightning.cli."""

import sys

from kanllama_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
