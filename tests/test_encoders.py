"""The ladder of encoders and the known directions: their parts, and both from end to end."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from scipy.optimize import nnls

from benchmarks import encoders
from benchmarks.encoders import (
    CHOOSING_SEED,
    UNROLLED,
    Cells,
    Unrolled,
    encoder_head,
    fixed_head,
    graded_world,
    latents_needed,
    main,
    pursuit,
    spend,
    told,
    train,
    world,
)
from kanllama_lightning.heads import BatchTopK
from kanllama_lightning.types import InputError

D, M, K = 12, 30, 3


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def teacher() -> BatchTopK:
    head = BatchTopK(d_model=D, d_sae=M, target_l0=K)
    head.start_(rows(500))
    return head


def test_pursuit_is_the_greedy_one_with_the_best_values() -> None:
    x = rows(30)
    atoms = torch.randn(M, D, generator=torch.Generator().manual_seed(4))
    atoms /= atoms.norm(dim=1, keepdim=True)
    found = pursuit(x, atoms, 4)
    for row, errors in zip(x.double(), found, strict=True):
        chosen: list[int] = []
        left = row.clone()
        for step in range(4):
            gain = atoms.double() @ left
            gain[chosen] = -torch.inf
            chosen.append(int(gain.argmax()))
            values, error = nnls(atoms[chosen].double().T.numpy(), row.numpy())
            left = row - torch.from_numpy(values) @ atoms[chosen].double()
            assert float(errors[step]) == pytest.approx(error**2, rel=1e-3)


def test_spending_takes_the_best_share_of_falling_gains() -> None:
    """Against every way of sharing atoms out, where each next atom of a row gains less."""
    x2 = torch.tensor([10.0, 10.0, 10.0])
    errors = torch.tensor([[4.0, 2.0, 1.0], [9.5, 9.2, 9.0], [6.0, 3.0, 1.5]])
    every = torch.cat([x2[:, None], errors], 1)
    ways = [w for w in itertools.product(range(4), repeat=3) if sum(w) == 3]
    best = min(float(sum(every[i, n] for i, n in enumerate(way))) for way in ways)
    assert float(spend(x2, errors, 1).sum()) == best
    assert spend(x2, errors, 3).tolist() == errors[:, -1].tolist()


def test_unrolled_steps_start_as_the_linear_encoder_and_are_trained() -> None:
    own, x = teacher(), rows(600, seed=1)
    start = rows(500)
    linear, *unrolled = (fixed_head(kind, own, 0, start) for kind in ("linear", *UNROLLED))
    for head in unrolled:
        assert torch.equal(linear(x).x_hat, head(x).x_hat)
    D_before = own.decoder.first().clone()
    for head in (linear, *unrolled):
        train(head, x, 12_000, 5e-3, 0)
        assert torch.equal(head.decoder.first(), D_before)
        assert torch.equal(head.b_dec, own.b_dec)
    for head, steps in zip(unrolled, UNROLLED.values(), strict=True):
        assert isinstance(head.encoder, Unrolled)
        assert [float(step.detach().abs().max()) > 0 for step in head.encoder.steps] == [
            True
        ] * steps


def test_all_encoders_of_the_ladder_have_the_same_dictionary_and_selection() -> None:
    own = teacher()
    for kind in ("linear", "mlp", "kan", *UNROLLED):
        head = fixed_head(kind, own, 7, rows(500, seed=2))
        assert torch.equal(head.decoder.first(), own.decoder.first())
        assert torch.equal(head.scale, own.scale)
        assert not any(name.startswith("decoder") for name, _ in head.named_parameters())
    sizes = {
        kind: sum(p.numel() for p in encoder_head(kind, 64, 512, 8, 0).encoder.parameters())
        for kind in ("mlp", "kan")
    }
    assert sizes["mlp"] == pytest.approx(sizes["kan"], rel=0.01)


def test_known_directions_fire_as_often_as_they_should_and_together_where_asked() -> None:
    alone, together = (world(0, c) for c in (0.0, 0.9))
    assert float(alone.p.sum()) == pytest.approx(8)
    assert torch.equal(alone.directions, together.directions)
    x, fires = together.rows(20_000, 1)
    error = (fires.float().mean(0) - together.p).abs() / (together.p / 20_000).sqrt()
    assert error.max() < 5
    pair = (fires[:, 0] & fires[:, 1]).float().mean()
    assert pair > 3 * together.p[0] * together.p[1]
    assert (alone.rows(20_000, 1)[1][:, :2].all(1)).float().mean() < 2 * alone.p[0] * alone.p[1]
    x, fires = alone.rows(20_000, 1)
    single = fires.sum(1) == 1
    strength = (x[single] * alone.directions[fires[single].int().argmax(1)]).sum(1)
    assert len(strength) > 10
    torch.testing.assert_close(strength, x[single].norm(dim=1))
    assert strength.min() >= 0.0999
    assert 0.7 < strength.mean() < 1.3


def test_graded_variables_are_there_as_often_as_they_should_and_lie_on_their_curves() -> None:
    world_ = graded_world(0)
    rows_ = world_.rows(20_000, 1)
    assert rows_.there.float().mean(0).sub(encoders.THERE).abs().max() < 0.02
    plain, fires = world_.plain.rows(20_000, 1)
    assert float(fires.float().sum(1).mean()) == pytest.approx(6, abs=0.1)
    products = world_.planes @ world_.planes.mT
    torch.testing.assert_close(products, torch.eye(2).expand_as(products), atol=1e-5, rtol=0)
    alone = rows_.there[:, 6] & (rows_.there.sum(1) == 1)
    inside = (rows_.x - plain)[alone] @ world_.planes[6].T
    torch.testing.assert_close(
        torch.atan2(inside[:, 1], inside[:, 0]).abs(), rows_.angle[alone, 6], atol=1e-3, rtol=0
    )
    assert float(inside.norm(dim=1).mean()) == pytest.approx(1, abs=0.02)
    spans = rows_.angle.amax(0)
    assert spans[0] > 6.2
    assert 3.1 < spans[7] < 3.15


def test_what_latents_tell_of_a_value() -> None:
    """One that follows it tells all; tiles tell it together; other ones tell nothing."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(4000, generator=generator) * 6.28
    value = torch.stack([angle.cos(), angle.sin()], 1)
    chance = torch.rand(4000, 20, generator=generator)
    centres = torch.linspace(0, 6.28, 9)[:-1]
    tiles = (angle[:, None] - centres).cos().clamp_min(0)
    assert latents_needed(told(torch.cat([chance, angle[:, None] + 0.1], 1), value)) == 1
    found = told(torch.cat([chance, tiles], 1), value)
    assert 1 < latents_needed(found) <= 4
    assert all(b > a - 0.01 for a, b in itertools.pairwise(found))
    assert max(told(chance, value)) < 0.02
    assert latents_needed(told(chance, value)) == encoders.MOST + 1
    assert told(torch.zeros(100, 3), value[:100]) == [0.0]
    x = torch.cat([chance, 3 * value @ torch.randn(2, 5, generator=generator)], 1)
    assert encoders.read(x, value) == pytest.approx([1], abs=1e-4)
    assert encoders.read(chance, value)[0] < 0.02


def test_the_table_of_graded_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians over variables and of each world, and R2 of so many latents."""
    cells = Cells("graded", {"rows": 1, "tokens": 1}, tmp_path, 1)

    def made(asked: list[encoders.Cell]) -> list[dict[str, object]]:
        shared = {"choose": 0.5, "fvu": 0.5, "l0": 8.0, "dead": 0.0, "parameters": 10}
        r2 = [[0.1, 0.2, 0.3, 0.95]] * 4 + [[0.91]] * 4
        return [shared | {"r2": [[0.7]] * 8 if c.kind == "read" else r2} for c in asked]

    monkeypatch.setattr(cells, "all", made)
    table = encoders.graded(cells, 2)
    assert "coordinates: R2 0.70" in table
    line = next(row for row in table.splitlines() if row.startswith("| bent |"))
    assert "| 4 (4, 4) | 0.10 | 0.20 | 0.95 | 0.95 | 1 (1, 1) | 0.91 | 0.91 | 0.91 |" in line
    cells.pool.shutdown()


@pytest.mark.slow
def test_every_head_of_the_graded_variables_is_made_and_measured() -> None:
    make = encoders.graded_cells({"rows": 4096, "tokens": 2048})
    figures = make(encoders.Cell("untrained", 0, 0.0))
    assert len(figures["r2"]) == encoders.VARIABLES
    assert max(r2[0] for r2 in figures["r2"]) < 0.5
    sizes = {
        kind: sum(p.numel() for p in encoder_head(kind, 64, 512, 8, 0).parameters())
        for kind in ("larger", "bent")
    }
    assert sizes["larger"] == pytest.approx(sizes["bent"], rel=0.01)


def test_the_grid_of_rates_grows_at_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = Cells("truth", {"correlation": 0.0}, tmp_path, 1)
    monkeypatch.setattr(
        cells, "all", lambda asked: [{"choose": abs(cell.lr - 0.05)} for cell in asked]
    )
    assert cells.rates(["kan"]) == {"kan": (0.048, True)}
    monkeypatch.setattr(cells, "all", lambda asked: [{"choose": -cell.lr} for cell in asked])
    assert cells.rates(["kan"])["kan"][1] is False
    cells.pool.shutdown()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--runs"):
        main(["ladder", "--runs", str(tmp_path)])
    with pytest.raises(InputError, match=r"--correlation=1\.5"):
        main(["truth", "--correlation", "1.5", "--out", str(tmp_path)])


@pytest.mark.slow
def test_truth_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "EXTENSIONS", 0)
    args = ["truth", "--out", str(tmp_path), "--tokens", "6144", "--rows", "4096", "--seeds", "2"]
    assert main(args) == 0
    table = capsys.readouterr().out
    for name in ("linear", "wide", "mlp", "kan", "kan minus mlp"):
        assert f"| {name} |" in table
    made = {path.name: path.stat().st_mtime for path in tmp_path.glob("truth/*.json")}
    one = json.loads(next(tmp_path.glob(f"truth/kan-seed_{CHOOSING_SEED}-*.json")).read_text())
    assert 0 < one["mcc"] < 1
    assert one["choose"] < 1
    assert main(args) == 0
    assert capsys.readouterr().out == table
    assert made == {path.name: path.stat().st_mtime for path in tmp_path.glob("truth/*.json")}
