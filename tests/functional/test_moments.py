"""Chunked statistics against NumPy on the whole sample."""

import numpy as np
import pytest
import torch

from kanllama_lightning.functional import moments


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_numpys_whatever_the_chunk(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "CHUNK_ROWS", chunk)
    x = (torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1000).to(dtype)
    whole = x.double().numpy()
    mean, std = moments.mean_and_std(x)
    assert mean.numpy() == pytest.approx(whole.mean(0), rel=1e-12)
    assert std.numpy() == pytest.approx(whole.std(0, ddof=1), rel=1e-9)
    assert moments.norms(x).numpy() == pytest.approx(np.linalg.norm(whole, axis=1), rel=1e-6)
