"""The head code, the formats and the plug-in do without Lightning and the rest of the package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ("lightning", "transformers", "datasets", "wandb", "torchmetrics", "jsonargparse")
CODE = f"""
import sys
for name in {WITHOUT}:
    sys.modules[name] = None  # as if it were not installed: importing it fails
import kanllama_lightning.heads
import kanllama_lightning.exchange.formats
import kanllama_lightning.exchange.agreement
"""


def test_heads_and_formats_import_without_lightning() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
