"""The trellis codec against brute force over all paths, a decoder that reads one bit at a time, and rate theory."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, get_codec
from compress.codecs.grid import ScaleGrid
from compress.codecs.names import stored_bytes
from compress.codecs.trellis import STATE_BITS, code_table, encode, pack_states, unpack_states, viterbi
from compress.solvers import gptq, rtn
from compress.solvers.options import GptqOptions, RtnOptions

BITS = (2, 3, 4)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _windows(string: str, width: int, bits: int) -> list[int]:
    """Every window of `width` characters that ends with a whole symbol."""
    return [int(string[i - width : i], 2) for i in range(width, len(string) + 1, bits)]


def _all_paths(state_bits: int, bits: int, length: int) -> Tensor:
    """States of every path: [2^(state_bits + (length - 1) bits), length]."""
    total = state_bits + (length - 1) * bits
    return torch.tensor([_windows(f"{i:0{total}b}", state_bits, bits) for i in range(1 << total)])


def _all_circles(state_bits: int, bits: int, length: int) -> Tensor:
    """States of every tail-biting path: [2^(length bits), length]."""
    strings = (f"{i:0{length * bits}b}" for i in range(1 << (length * bits)))
    return torch.tensor([_windows(s[bits - state_bits :] + s, state_bits, bits)[:length] for s in strings])


def _costs(paths: Tensor, target: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """target, weight: [N, T] -> float64 [N, paths]."""
    values = table.double()[paths]
    return torch.stack([(w * (x - values) ** 2).sum(1) for x, w in zip(target.double(), weight.double(), strict=True)])


def _is_path(states: Tensor, state_bits: int, bits: int) -> bool:
    """states [N, T]: all but the newest symbol of each is all but the oldest of the one before."""
    suffix = states & ((1 << (state_bits - bits)) - 1)
    return bool((states[:, 1:] >> bits == suffix[:, :-1]).all())


# -- search
@pytest.mark.parametrize(("state_bits", "bits", "length"), [(3, 1, 9), (4, 1, 8), (4, 2, 4), (5, 2, 4), (6, 3, 3)])
def test_viterbi_finds_the_best_of_all_paths(state_bits: int, bits: int, length: int) -> None:
    """Ends free, and with the bits before the first symbol prescribed for both ends."""
    table = code_table(state_bits, bits)
    target, weight = _randn(12, length, seed=1), torch.exp(_randn(12, length, seed=2))
    paths = _all_paths(state_bits, bits, length)
    costs = _costs(paths, target, weight, table)
    states = viterbi(target.T.contiguous(), weight.T.contiguous(), table, bits).T
    assert _is_path(states, state_bits, bits)
    found = (weight * (target - table[states]) ** 2).double().sum(1)
    torch.testing.assert_close(found, costs.min(1).values, rtol=1e-5, atol=1e-6)

    seam = torch.arange(12) % (1 << (state_bits - bits))
    states = viterbi(target.T.contiguous(), weight.T.contiguous(), table, bits, seam).T
    assert _is_path(states, state_bits, bits)
    last = paths[:, -1] & ((1 << (state_bits - bits)) - 1)
    allowed = (paths[:, 0] >> bits == seam[:, None]) & (last == seam[:, None])
    found = (weight * (target - table[states]) ** 2).double().sum(1)
    torch.testing.assert_close(found, costs.masked_fill(~allowed, torch.inf).min(1).values, rtol=1e-5, atol=1e-6)
    assert (states[:, 0] >> bits == seam).all() and (states[:, -1] & ((1 << (state_bits - bits)) - 1) == seam).all()


def test_every_seam_tried_is_the_best_tail_biting_path() -> None:
    """What the next test takes for the optimum, against all circular strings."""
    table, target, weight = code_table(4, 1), _randn(20, 10, seed=3), torch.ones(20, 10)
    best = _costs(_all_circles(4, 1, 10), target, weight, table).min(1).values
    torch.testing.assert_close(_best_seam_cost(target, table, 1).double(), best, rtol=1e-5, atol=1e-6)


def _best_seam_cost(target: Tensor, table: Tensor, bits: int) -> Tensor:
    """Least squared error [N] over all tail-biting paths: one exact search from every state of the seam."""
    costs = []
    for seam in range(len(table) >> bits):
        states = viterbi(target.T, torch.ones_like(target).T, table, bits, torch.full((len(target),), seam)).T
        costs.append((target - table[states]).square().sum(1))
    return torch.stack(costs).amin(0)


@pytest.mark.parametrize(("state_bits", "bits", "length"), [(4, 1, 64), (6, 2, 64), (8, 2, 128)])
def test_two_passes_come_near_the_best_tail_biting_path(state_bits: int, bits: int, length: int) -> None:
    table, target = code_table(state_bits, bits), _randn(24, length, seed=4)
    states = encode(target, torch.ones_like(target), table, bits)
    assert _is_path(torch.cat((states, states[:, :1]), dim=1), state_bits, bits)
    best = _best_seam_cost(target, table, bits)
    found = (target - table[states]).square().sum(1)
    assert (found >= best * (1 - 1e-5)).all()
    assert found.sum() < 1.02 * best.sum()
    assert (found <= best * (1 + 1e-5)).double().mean() > 0.5


def test_tiles_do_not_depend_on_each_other_on_chunks_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    target, weight, table = _randn(6, 256, seed=4), torch.ones(6, 256), code_table(8, 2)
    together = encode(target, weight, table, 2)
    with ThreadPoolExecutor(2) as pool:
        alone = list(pool.map(lambda i: encode(target[i : i + 1], weight[i : i + 1], table, 2), range(6)))
    assert torch.equal(together, torch.cat(alone))
    monkeypatch.setattr("compress.codecs.trellis.FLOATS", 256 * 64 * 4)
    assert torch.equal(together, encode(target, weight, table, 2))


def test_weights_steer_the_error_and_extremes_are_harmless() -> None:
    codec = get_codec("trellis2")
    target = _randn(64, 16, seed=5)
    loud = torch.ones(16)
    loud[:8] = 9.0
    flat, steered = (codec.nearest(target, w) for w in (torch.ones(16), loud))
    before, after = ((target - units)[:, :8].square().mean() for units in (flat, steered))
    assert after < 0.75 * before
    assert torch.equal(flat, codec.nearest(target, 7.0 * torch.ones(64, 16)))
    loud[8:] = 0.0
    mute = codec.nearest(target, loud)
    assert (target - mute)[:, :8].square().mean() < 0.8 * after, "columns without a say leave their bits to the others"
    wild = target.clone()
    wild[3, 3], wild[40, 2] = 1e30, -1e30
    units = codec.nearest(wild, torch.zeros(16))
    assert torch.isfinite(units).all()
    units = codec.nearest(wild, torch.ones(16))
    assert units[3, 3] > 2.5 and units[40, 2] < -2.5


# -- the table
@pytest.mark.parametrize("bits", BITS)
def test_table_is_a_partition_of_the_normal_distribution(bits: int) -> None:
    table, strata = code_table(STATE_BITS, bits).double(), 1 << bits
    values = table.sort().values
    assert (values.diff() > 0).all(), "values must be distinct, units are turned back into states"
    quantiles = NormalDist().cdf
    levels = torch.tensor([quantiles(v) for v in values.tolist()], dtype=torch.float64) * len(table)
    # half precision moves a value by up to half a quantile
    torch.testing.assert_close(levels, torch.arange(len(table), dtype=torch.float64) + 0.5, rtol=0, atol=0.6)
    stratum = torch.searchsorted(values, table) // (len(table) >> bits)
    every = torch.arange(strata)
    assert (stratum.reshape(-1, strata).sort(1).values == every).all(), "successors of a state"
    assert (stratum.reshape(strata, -1).T.sort(1).values == every).all(), "predecessors of a state"


@pytest.mark.parametrize(
    ("bits", "digest"), [(2, "9b80f94ffab3f686"), (3, "7a2db0f3c4a8b4f6"), (4, "46db4e911589ec77")]
)
def test_table_never_changes(bits: int, digest: str) -> None:
    """Files hold states, not values: another table would silently break every one."""
    data = code_table(STATE_BITS, bits).half().numpy().tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_a_window_must_hold_two_symbols() -> None:
    with pytest.raises(ValueError, match="two symbols"):
        code_table(5, 3)


# -- bytes
@pytest.mark.parametrize(("state_bits", "bits"), [(12, 2), (12, 3), (12, 4), (6, 2), (16, 4), (9, 3), (16, 1)])
def test_states_survive_packing(state_bits: int, bits: int) -> None:
    codes = torch.randint(0, 256, (3, 2, 32 * bits), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
    states = unpack_states(codes, bits, state_bits)
    assert states.shape == (3, 2, 256) and int(states.min()) >= 0 and int(states.max()) < 1 << state_bits
    assert torch.equal(pack_states(states.long(), bits), codes)
    circle = torch.cat((states, states[..., :1]), dim=-1).reshape(-1, 257)
    assert _is_path(circle, state_bits, bits)


@pytest.mark.parametrize("bits", BITS)
def test_decoder_equals_one_that_reads_bit_by_bit(bits: int) -> None:
    codec, table = get_codec(f"trellis{bits}"), code_table(STATE_BITS, bits).tolist()
    codes = torch.randint(0, 256, (2, 3, 32 * bits), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    scales = _randn(32, seed=8).abs().half()
    packed = codec.pack(codec.decode_codes(codes), ScaleGrid(scales.float()[:, None]))
    assert torch.equal(packed.parts["codes"], codes)
    decoded = codec.unpack(packed)
    assert decoded.dtype == torch.float32 and decoded.shape == packed.shape == (32, 48)
    for i in range(2):
        for j in range(3):
            string = "".join(f"{byte:08b}" for byte in codes[i, j].tolist())
            for t in range(256):
                window = "".join(string[(t * bits + bits - STATE_BITS + k) % len(string)] for k in range(STATE_BITS))
                row = 16 * i + t // 16
                expected = torch.tensor(table[int(window, 2)]) * scales[row].float()
                assert decoded[row, 16 * j + t % 16] == expected
    assert torch.equal(codec.decode_codes(codes[1:]), codec.decode_codes(codes)[16:]), "a chunk of rows"


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_planned(bits: int) -> None:
    shape = (32, 64)
    codec = block_codec(f"trellis{bits}", shape[1])
    packed = rtn.solve(_randn(*shape, seed=9), None, codec, RtnOptions()).pack()
    held = sum(part.numel() * part.element_size() for part in packed.parts.values())
    signs = shape[0] // 8 + shape[1] // 8
    assert held == stored_bytes(codec.name, shape) - signs == shape[0] * shape[1] * bits // 8 + 2 * shape[0]
    assert held * 8 == pytest.approx(codec.bits_per_weight(shape[1]) * shape[0] * shape[1])


def test_what_is_no_tile_and_no_path_is_refused() -> None:
    codec = block_codec("trellis2", 32)
    with pytest.raises(ValueError, match="16 rows"):
        codec.nearest(_randn(24, 16), torch.ones(16))
    solution = rtn.solve(_randn(16, 32, seed=10), None, codec, RtnOptions())
    with pytest.raises(ValueError, match="16 rows"):
        codec.pack(solution.units[:8], ScaleGrid(solution.grid.scale[:8]))
    broken = solution.units.clone()
    broken[5, 20] = code_table(STATE_BITS, 2)[torch.searchsorted(code_table(STATE_BITS, 2).sort().values, 0.3)]
    for units in (broken, solution.units + 1e-4):
        with pytest.raises(ValueError, match="tail-biting"):
            codec.pack(units, solution.grid)


# -- rate and distortion
@pytest.mark.parametrize(("bits", "limit"), [(2, 0.071), (3, 0.0182), (4, 0.0047)])
def test_gaussian_error_at_exactly_that_rate(bits: int, limit: float) -> None:
    """Scalar Lloyd-Max quantizers reach .1175, .0345 and .0095; no code can beat 4^-bits."""
    weight = _randn(128, 256, seed=11)
    solution = rtn.solve(weight, None, block_codec(f"trellis{bits}", 256), RtnOptions())
    error = float((weight - solution.decode()).square().mean() / weight.square().mean())
    assert 4.0**-bits < error <= limit


# -- solvers
def _gram(n: int, seed: int = 12) -> Tensor:
    """Rotated, with eigenvalues falling as 1/i, as inputs look in incoherent space."""
    basis = torch.linalg.qr(_randn(n, n, seed=seed))[0]
    gram = (basis / torch.arange(1, n + 1)) @ basis.T * n
    return (gram + gram.T) / 2


def test_rtn_rounds_tile_by_tile() -> None:
    """A tile at a time through the search, loud columns and rows of different scales weighing what they do."""
    weight = 0.02 * _randn(32, 48, seed=13) * torch.exp(0.5 * _randn(32, 1, seed=14))
    gram = torch.diag(torch.exp(_randn(48, seed=15)))
    codec = block_codec("trellis3", 48)
    solution = rtn.solve(weight, gram, codec, RtnOptions())
    table, scale = code_table(STATE_BITS, 3), solution.grid.scale
    for i in range(0, 32, 16):
        for j in range(0, 48, 16):
            rows, columns = slice(i, i + 16), slice(j, j + 16)
            price = gram.diagonal()[columns] * scale[rows] ** 2
            states = encode((weight / scale)[rows, columns].reshape(1, -1), price.reshape(1, -1), table, 3)
            assert (table[states].reshape(16, 16) == solution.units[rows, columns]).float().mean() > 0.99


def test_feedback_and_sweeps_lower_the_objective() -> None:
    n = 96
    weight, gram, codec = 0.02 * _randn(32, n, seed=16), _gram(n), block_codec("trellis2", n)
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    solutions = [rtn.solve(weight, gram, codec, RtnOptions())]
    solutions += [gptq.solve(weight, gram, codec, GptqOptions(damping=0.01, refits=r, sweeps=s))
                  for r, s in ((0, 0), (2, 0), (2, 1))]  # fmt: skip
    costs = []
    for solution in solutions:
        assert torch.equal(codec.unpack(solution.pack()), solution.decode())  # every tile still is a path
        error = (weight - solution.decode()).double()
        costs.append(float(((error @ hessian) * error).sum()))
    assert costs[1] < 0.7 * costs[0]
    assert costs[2] <= costs[1] * (1 + 1e-6) and costs[3] <= costs[2] * (1 + 1e-6)


def test_feedback_weighs_rows_by_their_scales() -> None:
    """One step of columns has nothing to feed back: its tile is one search under the gram's diagonal."""
    weight = 0.02 * _randn(16, 16, seed=17) * torch.exp(_randn(16, 1, seed=18))
    gram, codec = _gram(16), block_codec("trellis2", 16)
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=0.01, refits=0, sweeps=0))
    scale = solution.grid.scale
    price = (gram.diagonal() + 0.01 * gram.diagonal().mean()) * scale**2
    states = encode((weight / scale).reshape(1, -1), price.reshape(1, -1), code_table(STATE_BITS, 2), 2)
    assert (code_table(STATE_BITS, 2)[states].reshape(16, 16) == solution.units).float().mean() > 0.99


def test_a_sweep_decides_for_whole_tiles() -> None:
    """The objective is a sum over rows, so it may not rise for any sixteen coded together; and a mix of rows, some of
    them moved and others not, would be no path."""
    n = 64
    weight, gram, codec = 0.02 * _randn(64, n, seed=19), _gram(n), block_codec("trellis2", n)
    before, after = (gptq.solve(weight, gram, codec, GptqOptions(damping=0.01, refits=0, sweeps=s)) for s in (0, 1))
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    errors = [(weight - s.decode()).double() for s in (before, after)]
    first, second = (((e @ hessian) * e).sum(1).reshape(-1, 16).sum(1) for e in errors)
    assert (second <= first * (1 + 1e-6)).all() and second.sum() < first.sum()
    assert not torch.equal(before.units, after.units)
    assert torch.equal(codec.unpack(after.pack()), after.decode())


@pytest.mark.parametrize("silent", ["rows", "everything"])
def test_silent_rows_decode_to_zero(silent: str) -> None:
    weight = 0.02 * _randn(16, 32, seed=18)
    weight[3 if silent == "rows" else slice(None)] = 0.0
    decoded = gptq.solve(weight, _gram(32), block_codec("trellis2", 32), GptqOptions(sweeps=1)).decode()
    assert torch.isfinite(decoded).all() and not decoded[weight.abs().sum(1) == 0].any()
