"""E8P against its definition, brute force over all codes, rate-distortion theory and the solvers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, e8p, get_codec
from compress.codecs.e8p import E8PCodec, ResidualCodec, e8_short_vectors, e8p_index, e8p_points, magnitudes
from compress.codecs.grid import ScaleGrid
from compress.codecs.names import codec_info, stored_bytes
from compress.solvers.base import relative_error
from compress.solvers.gptq import solve as gptq
from compress.solvers.options import GptqOptions, RtnOptions
from compress.solvers.rtn import solve as rtn
from compress.transforms.incoherence import Incoherence
from compress.weights import Packed

NAMES = ("e8p", "e8p3", "e8p4")
ONE = torch.ones(8)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _form(seed: int, spread: float = 0.05) -> Tensor:
    """A positive definite form with a condition number of a few, as the solver's metrics have in incoherent space."""
    root = torch.eye(8) + spread * _randn(8, 8, seed=seed)
    return root @ root.T


def _in_e8(points: Tensor) -> Tensor:
    """All integers or all half-integers, with an even sum."""
    integers = (points.remainder(1) == 0).all(-1)
    halves = (points.remainder(1) == 0.5).all(-1)
    return (integers | halves) & (points.sum(-1).remainder(2) == 0)


def _cost(error: Tensor, form: Tensor) -> Tensor:
    return ((error @ form) * error).sum(-1)


def _least(target: Tensor, form: Tensor) -> Tensor:
    """Squared distance of every target to the nearest of all 65536 points, one target after the other."""
    return torch.stack([_cost(e8p_points() - x, form).min() for x in target])


@functools.cache
def _correlated() -> tuple[Tensor, Tensor]:
    """Weight [16, 128] and a gram with an exponentially decaying spectrum in a random basis."""
    basis = torch.linalg.qr(_randn(128, 128, seed=1).double())[0]
    gram = (basis * torch.exp(-6 * torch.arange(128) / 128).double()) @ basis.T
    return _randn(16, 128, seed=2), gram.float()


# -- codebooks
def test_table_is_the_ball_and_29_more() -> None:
    table = magnitudes()
    norms = table.square().sum(1)
    assert table.shape == (256, 8) and len(table.unique(dim=0)) == 256
    assert set(table.unique().tolist()) == {0.5, 1.5, 2.5}
    assert {n: int((norms == n).sum()) for n in (2, 4, 6, 8, 10, 12)} == {
        2: 1, 4: 8, 6: 28, 8: 56 + 8, 10: 70 + 56, 12: 29,
    }  # fmt: skip


def test_points_are_all_different_and_of_the_shifted_lattice() -> None:
    points = e8p_points()
    assert points.shape == (1 << 16, 8) and len(points.unique(dim=0)) == 1 << 16
    assert _in_e8(points - 0.25).all()
    assert _in_e8(e8_short_vectors()).all() and len(e8_short_vectors().unique(dim=0)) == 256
    norms = e8_short_vectors().square().sum(1)
    assert [int((norms == n).sum()) for n in (0, 2, 4)] == [1, 240, 15]


@pytest.mark.parametrize("code", [0, 1, 2, 0xFF, 0x8000, 0xFFFF, 12345, 54321, 40000])
def test_a_code_by_the_letter_of_the_definition(code: int) -> None:
    s = magnitudes()[code >> 8].tolist()
    for i in range(1, 8):
        s[i] *= -1 if code >> i & 1 else 1
    if sum(s) % 2:
        s[0] *= -1
    assert sum(s) % 2 == 0
    assert e8p_points()[code].tolist() == [x - 0.25 if code & 1 else x + 0.25 for x in s]


def test_every_code_comes_back_and_other_points_are_refused() -> None:
    codes = e8p_index(e8p_points())
    assert codes.dtype == torch.int16 and torch.equal(codes.long() & 0xFFFF, torch.arange(1 << 16))
    far = e8p_points()[:1] + 4 * torch.eye(8)[:1]
    for wrong in (torch.zeros(1, 8), far, e8p_points()[:1] + 0.5, torch.full((1, 8), torch.nan)):
        with pytest.raises(ValueError, match="not points of E8P"):
            e8p_index(wrong)


# -- search
@pytest.mark.parametrize("size", [0.3, 1.03, 3.0])
def test_nearest_is_exact_for_diagonal_metrics(size: float) -> None:
    """Inside the ball, around its surface and far outside; one weight for all, one each, and as a metric."""
    codec, target = get_codec("e8p"), size * _randn(60, 8, seed=1)
    for weight, metric in (
        (ONE, None),
        (ONE, torch.eye(8)),
        (_rand(8) + 0.05, None),
        (w := _rand(8, seed=1), w.diag()),
    ):
        found = codec.nearest(target, weight, metric)
        e8p_index(found)
        torch.testing.assert_close(_cost(found - target, weight.diag()), _least(target, weight.diag()))
    each = _rand(60, 8, seed=2) + 0.05
    least = torch.cat([_least(x[None], w.diag()) for x, w in zip(target, each, strict=True)])
    torch.testing.assert_close((each * (codec.nearest(target, each) - target).square()).sum(1), least)


def test_nearest_at_odd_places() -> None:
    """The origin, points of the codebook, a target far out on one axis, and weights that are zero."""
    codec, some = get_codec("e8p"), e8p_points()[::997]
    assert torch.equal(codec.nearest(some, ONE), some)
    assert torch.equal(codec.nearest(some, ONE, _form(1)), some)
    target = torch.cat((torch.zeros(1, 8), 1e4 * torch.eye(8), torch.full((1, 8), -50.0)))
    torch.testing.assert_close(_cost(codec.nearest(target, ONE) - target, torch.eye(8)), _least(target, torch.eye(8)))
    e8p_index(codec.nearest(target, torch.zeros(8)))
    for metric in (None, _form(2)):
        e8p_index(codec.nearest(torch.full((1, 8), 1e30), ONE, metric))


@pytest.mark.parametrize("seed", range(3))
def test_short_list_nearly_finds_the_best_under_any_metric(seed: int) -> None:
    form, target = _form(seed), 1.03 * _randn(200, 8, seed=seed + 10)
    best = _least(target, form).mean()
    codec = get_codec("e8p")
    ranked = _cost(codec.nearest(target, form.diagonal(), form) - target, form).mean()
    plain = _cost(codec.nearest(target, form.diagonal()) - target, form).mean()
    assert best * 0.9999 <= ranked < 1.01 * best and ranked < 0.5 * (best + plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_does_not_depend_on_its_neighbours(name: str) -> None:
    codec, target = get_codec(name), _randn(4100, 8)
    together = codec.nearest(target, ONE)
    for at in (slice(0, 3), slice(2046, 2050), slice(4099, 4100)):
        assert torch.equal(codec.nearest(target[at], ONE), together[at])


@pytest.mark.parametrize(("name", "limit"), [("e8p", 0.0925), ("e8p3", 0.0290), ("e8p4", 0.0081)])
def test_error_on_a_gaussian_source(name: str, limit: float) -> None:
    """Below Lloyd-Max scalars (.1175, .0345, .0095; Max, IRE Trans. Inf. Theory 6, 1960) and above Shannon's 4^-bits."""
    codec = block_codec(name, 1024)
    weight = _randn(16, 1024, seed=3)
    grid = codec.fit(weight, torch.ones(1024))
    u = codec.nearest((weight / grid.scale).reshape(-1, 8), ONE).reshape(weight.shape)
    error = float((weight - codec.decode(u, grid)).square().mean() / weight.square().mean())
    assert 4.0 ** -codec_info(name).bits < error < limit


def test_second_codes_are_chosen_together_with_the_first() -> None:
    """The nearest point and the best second code for what it leaves lose to the beam; never for a single group."""
    for name in ("e8p3", "e8p4"):
        codec, target = get_codec(name), _randn(800, 8) / 1.1
        assert isinstance(codec, ResidualCodec)
        first = get_codec("e8p").nearest(target, ONE)
        finer = codec.tables()[1]
        rest = torch.cat([torch.cdist(x, finer).amin(1).square() for x in (target - first).split(50)])
        beam = (codec.nearest(target, ONE) - target).square().sum(1)
        assert (beam <= rest + 1e-4).all() and beam.mean() < 0.97 * rest.mean()


@pytest.mark.parametrize(("name", "count"), [("e8p3", 6), ("e8p4", 3)])
def test_beam_against_all_pairs_of_codes(name: str, count: int) -> None:
    """Every first code with its best second one: 2^24 and 2^32 sums a target."""
    codec, target, weight = get_codec(name), _randn(count, 8, seed=6), _rand(8, seed=7) + 0.5
    finer = codec.tables()[1]
    best = []
    for x in target:
        left = x - e8p_points()
        if name == "e8p3":
            square = (weight * finer.square()).sum(1)
            least = ((weight * left.square()).sum(1)[:, None] + square - 2 * (weight * left) @ finer.T).min()
        else:  # the second search is one for the nearest point of E8P, which is tested above
            second = get_codec("e8p").nearest(left / float(codec.ratio), weight) * float(codec.ratio)
            least = (weight * (left - second).square()).sum(1).min()
        best.append(least)
    found, best = (weight * (codec.nearest(target, weight) - target).square()).sum(1), torch.stack(best)
    assert (found >= best * (1 - 1e-3) - 1e-5).all()
    assert found.sum() < 1.25 * best.sum()


# -- scales
@pytest.mark.parametrize("name", NAMES)
def test_scales_follow_the_rows_and_come_close_to_the_best(name: str) -> None:
    codec, weight = block_codec(name, 256), _randn(4, 256, seed=4)
    grid = codec.fit(weight, torch.ones(256))
    assert grid.scale.shape == (4, 1) and torch.equal(grid.scale, grid.scale.half().float())
    torch.testing.assert_close(codec.fit(weight * 0.01, torch.ones(256)).scale, 0.01 * grid.scale, rtol=1e-2, atol=0)

    def error(scale: Tensor) -> Tensor:
        u = codec.nearest((weight / scale).reshape(-1, 8), ONE).reshape(weight.shape)
        return (weight - u * scale).square().mean(1)

    best = torch.stack([error(grid.scale * stretch) for stretch in torch.linspace(0.7, 1.4, 29)]).amin(0)
    assert (error(grid.scale) < 1.06 * best).all() and error(grid.scale).mean() < 1.03 * best.mean()
    assert not codec.fit(torch.zeros(2, 256), torch.ones(256)).scale.any()


def test_scales_heed_the_importance() -> None:
    """Half the columns are large and do not matter: the scale suits the others."""
    codec, weight = block_codec("e8p", 256), _randn(8, 256, seed=5)
    weight[:, :128] *= 3
    importance = torch.ones(256)
    importance[:128] = 1e-4
    small = codec.fit(weight[:, 128:], torch.ones(128)).scale
    torch.testing.assert_close(codec.fit(weight, importance).scale, small, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_refit_repairs_a_wrong_scale_under_the_gram(name: str) -> None:
    weight, gram = _correlated()
    codec = block_codec(name, 128)
    grid = codec.fit(weight, torch.ones(128))
    u = codec.nearest((weight / grid.scale).reshape(-1, 8), ONE).reshape(weight.shape)
    wrong = ScaleGrid((grid.scale * 1.2).half().float())
    right = codec.refit(weight, u, wrong, gram)
    wanted = ((weight @ gram) * u).sum(1) / ((u @ gram) * u).sum(1)
    torch.testing.assert_close(right.scale[:, 0], wanted.half().float(), rtol=1e-3, atol=0)


# -- bytes
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_as_promised_and_decode_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e8p, "PACKED", 4 * 64)  # two rounds
    codec = block_codec(name, 64)
    tables = codec.tables()
    codes = [torch.randint(len(t), (6, 8), generator=torch.Generator().manual_seed(i)) for i, t in enumerate(tables)]
    units = sum(t[c] for t, c in zip(tables, codes, strict=True)).reshape(6, 64)
    grid = ScaleGrid((_rand(6, 1) + 0.1).half().float())
    packed = codec.pack(units, grid)
    for plane, part in zip(codes, ("codes", "residual"), strict=False):
        assert torch.equal(packed.parts[part].long() & (1 << 8 * packed.parts[part].itemsize) - 1, plane), (
            "one decomposition"
        )
    assert packed.parts["scales"].shape == (6,) and packed.parts["scales"].dtype == torch.float16
    assert packed.parts["codes"].dtype == torch.int16 and packed.parts["codes"].shape == (6, 8)
    size = sum(part.numel() * part.itemsize for part in packed.parts.values())
    assert size == stored_bytes(name, (6, 64)) - 1 - 8  # less the signs, which incoherence adds
    assert codec.bits_per_weight(64) == 8 * size / (6 * 64)
    assert torch.equal(get_codec(name).unpack(packed), codec.decode(units, grid))
    planes = [packed.parts[part] for part in ("codes", "residual") if part in packed.parts]
    assert torch.equal(codec.decode_codes(*planes, dtype=torch.float16).float(), units), "half precision holds units"


@pytest.mark.parametrize("name", NAMES)
def test_units_without_a_code_are_refused(name: str) -> None:
    codec = block_codec(name, 8)
    for wrong in (torch.zeros(1, 8), torch.full((1, 8), 9.25)):
        with pytest.raises(ValueError, match="units are not"):
            codec.pack(wrong, ScaleGrid(torch.ones(1, 1)))


def test_names() -> None:
    assert isinstance(get_codec("e8p"), E8PCodec)
    with pytest.raises(KeyError):
        get_codec("e8p5")


# -- solvers
@pytest.mark.parametrize("name", NAMES)
def test_feedback_beats_rounding(name: str) -> None:
    weight, gram = _correlated()
    codec = block_codec(name, 128)
    rounded, solved = rtn(weight, gram, codec, RtnOptions()), gptq(weight, gram, codec, GptqOptions())
    assert solved.error < 0.5 * rounded.error
    decoded = get_codec(name).unpack(solved.pack())
    assert relative_error(weight, decoded, gram) == pytest.approx(solved.error, rel=1e-4)


def test_incoherence_tames_outliers() -> None:
    """Loud columns and a spike: in incoherent space the same bits leave a fraction of the error, in either space."""
    weight, gram = _correlated()
    weight = weight.clone()
    weight[:, 5] *= 20
    weight[3, 7] = 60
    codec = block_codec("e8p", 128)
    turn = Incoherence.draw(16, 128, 1, 2)
    plain = gptq(weight, gram, codec, GptqOptions()).error
    solved = gptq(turn.weight(weight), turn.gram(gram), codec, GptqOptions())
    assert solved.error < 0.3 * plain
    packed = solved.pack()
    restored = turn.restore(get_codec("e8p").unpack(Packed("e8p", (16, 128), packed.parts)))
    assert relative_error(weight, restored, gram) == pytest.approx(solved.error, rel=1e-3)
