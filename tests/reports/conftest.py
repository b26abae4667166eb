"""Finished runs on the tiny model."""

import shutil

import pytest

from tests.conftest import SMALL, fit_for_many


@pytest.fixture(scope="session")
def trained(tiny_lm_dir, text_file, tmp_path_factory):
    """Two finished runs of different seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    given = SMALL | {
        "model.head": "KANEncoder",
        "lm.name": str(tiny_lm_dir),
        "data.train": str(text_file),
    }
    given |= {"data.val_tokens": "4096", "trainer.val_check_interval": "1000"}
    for seed in (0, 1):
        fit_for_many(given | {"seed_everything": seed, "run": folder / f"seed{seed}"})
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def run(runs):
    return runs / "seed0"
