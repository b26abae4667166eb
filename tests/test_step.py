"""The way of one training step through the code: short enough to be read."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kanllama_lightning.training.module import SAEModule
from tests.conftest import Fit
from tests.shapes import unchecked

PACKAGE = str(Path(sys.modules["kanllama_lightning"].__file__ or "").parent)
MOST = {"KANEncoder": (10, 30), "TopK": (8, 22)}
"""Files, and changes from one to another."""


@pytest.mark.parametrize("head", MOST)
def test_a_step_goes_through_few_files(head: str, fit: Fit, monkeypatch: pytest.MonkeyPatch):
    """A step with a full buffer, which neither runs the LM nor logs."""
    ways: list[list[str]] = []
    original = SAEModule.training_step

    def followed(self: SAEModule, dataloader_iter: Any) -> Any:
        files: list[str] = []

        def note(frame: Any, event: str, _: object) -> None:
            file = frame.f_code.co_filename
            if event == "call" and file.startswith(PACKAGE) and file not in files[-1:]:
                files.append(file)

        sys.setprofile(note)
        try:
            return original(self, dataloader_iter)
        finally:
            sys.setprofile(None)
            ways.append(files)

    monkeypatch.setattr(SAEModule, "training_step", followed)
    with unchecked():
        assert fit(model__head=head, trainer__log_every_n_steps="1000") == 0
    full = [way for way in ways[1:] if not any("/lm/" in file for file in way)]
    files, moves = MOST[head]
    assert full
    for way in full:
        assert len(set(way)) <= files, sorted(set(way))
        assert len(way) - 1 <= moves, [Path(file).stem for file in way]
