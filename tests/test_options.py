"""What is refused before anything is loaded: the LM named here does not exist."""

import pytest

from tests.conftest import Fit, rest_slow

WRONG = [
    ("trainer.accumulate_grad_batches=2", "sae_batch_tokens"),
    ("trainer.limit_train_batches=5", "model.tokens"),
    ("trainer.limit_train_batches=1", "model.tokens"),
    ("trainer.limit_train_batches=1.0", "model.tokens"),
    ("trainer.limit_val_batches=0", "data.val_tokens"),
    ("trainer.overfit_batches=2", "data.train"),
    ("trainer.max_epochs=3", "model.tokens"),
    ("trainer.min_steps=100", "model.tokens"),
    ("trainer.default_root_dir=X", "--run"),
    ("trainer.fast_dev_run=true", "model.tokens"),
    ("trainer.check_val_every_n_epoch=2", "val_check_interval"),
    ("trainer.reload_dataloaders_every_n_epochs=1", "one stream"),
    ("trainer.barebones=true", "time/"),
    ("trainer.enable_progress_bar=true", "Progress"),
    ("trainer.inference_mode=false", "leave it out"),
    ("trainer.val_check_interval=0", "at least 1"),
    ("trainer.val_check_interval=0.5", "whole number of steps"),
    ("trainer.val_check_interval=true", "whole number of steps"),
    ("trainer.log_every_n_steps=0", "at least 1"),
    ("trainer.max_steps=0", "at least 1"),
    ("trainer.max_time=1h", "DD:HH:MM:SS"),
    ("trainer.devices=0", "from 1 up"),
    ("trainer.num_nodes=0", "at least 1"),
    ("trainer.accelerator=gpu", "Lightning refuses"),
    ("trainer.gradient_clip_val=-1", "larger than 0"),
    ("trainer.gradient_clip_val=.nan", "larger than 0"),
    ("model.optimizer.lr=-1", "larger than 0"),
    ("model.optimizer.lr=0", "larger than 0"),
    ("model.optimizer.lr=null", "larger than 0"),
    ("model.optimizer.lr=.nan", "larger than 0"),
    ("model.optimizer.lr=.inf", "larger than 0"),
    ("model.optimizer.betas=[2,0.9]", "refuses its arguments"),
    ("model.optimizer.eps=-1", "refuses its arguments"),
    ("data={ctx_len: null}", "leave it out for 512"),
    ("model.tokens=0", "at least 1"),
    ("seed_everything=-1", "from 0 to"),
    ("seed_everything=true", "from 0 to"),
    ("seed_everything=false", "from 0 to"),
    ("seed_everything=99999999999", "from 0 to"),
]
FIXED = ("accumulate_grad_batches", "limit_val_batches", "default_root_dir", "barebones")
CHECKED = ("max_time", "devices", "accelerator", "log_every_n_steps")
OTHER = ("val_check_interval=0.5", "gradient_clip_val=-1", "lr=.nan", "betas", "ctx_len", "=true")
SOME = [one for one in WRONG if any(part in one[0] for part in (*FIXED, *CHECKED, *OTHER))]
"""One of each kind of check."""


@pytest.mark.parametrize("wrong", rest_slow(WRONG, SOME), ids=lambda wrong: wrong[0])
def test_one_line_before_anything_is_loaded(
    fit: Fit, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    given, said = wrong
    if given.endswith("=gpu"):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is one")
    option, _, value = given.partition("=")
    changed = {option: value, "lm.name": str(tmp_path / "nothing"), "runs_dir": str(tmp_path / "r")}
    code = fit(**changed)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert option.rpartition(".")[2] in err
    assert said in err
    assert not (tmp_path / "r").exists()
