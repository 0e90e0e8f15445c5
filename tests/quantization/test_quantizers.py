"""Round-to-nearest and HQQ: against loops over groups, and what every backend must hold to. The
kernels against the reference at every level are in tests/native."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyfastft as ft
from pyfastft import _native, backend
from pyfastft._codebook import TABLES
from pyfastft.functional import hqq_quantize, int4_dequantize, rtn_quantize
from pyfastft.quantization import QTensor4, quantize_weight
from pyfastft.quantization.tensor import unpack_codes
from pyfastft.testing.tolerance import assert_exact

BACKENDS = ["reference", *(["cpu"] if _native.why_no_cpu() is None else [])]
CODES = [("int4", False), ("int4", True), ("nf4", False), ("fp4", False)]
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def dense(quantized, k: int, g: int, codebook: str = "int4") -> torch.Tensor:
    codes, scale, zero = quantized
    with backend("reference"):
        return int4_dequantize(codes, scale, zero=zero, k=k, group_size=g, codebook=codebook)


def one_group(w: list[float], codebook: str, symmetric: bool, grid: int) -> tuple[float, list[int]]:
    """The best squared error and its codes in double, by the definition."""
    best, codes_of_best = float("inf"), []
    for i in range(grid):
        p = 1 - 0.5 * i / grid
        if codebook != "int4":
            scale = max(map(abs, w)) * p
            codes = [
                min(range(16), key=lambda c: (abs(TABLES[codebook][c] - v / scale), c)) for v in w
            ]
            values = [TABLES[codebook][c] for c in codes]
        else:
            low, high = min(0.0, *w), max(0.0, *w)
            scale = (max(map(abs, w)) / 7.5 if symmetric else (high - low) / 15) * p
            zero = 8 if symmetric else min(max(round(-low * p / scale), 0), 15)
            codes = [min(max(round(v / scale) + zero, 0), 15) for v in w]
            values = [c - zero for c in codes]
        error = sum((v - scale * q) ** 2 for v, q in zip(w, values, strict=True))
        if error < best:
            best, codes_of_best = error, codes
    return best, codes_of_best


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("codebook", "symmetric"), CODES)
@pytest.mark.parametrize("grid", [1, 7])
def test_rtn_against_the_definition(name: str, codebook: str, symmetric: bool, grid: int) -> None:
    n, k, g = 4, 19, 8
    w = torch.randn(n, k, dtype=torch.float64).float()
    with backend(name):
        codes, scale, zero = rtn_quantize(
            w, group_size=g, codebook=codebook, symmetric=symmetric, grid=grid
        )
        back = dense((codes, scale, zero), k, g, codebook).double()
    found = unpack_codes(codes, k)
    for row in range(n):
        for first in range(0, k, g):
            part = slice(first, min(first + g, k))
            best, expected = one_group(w[row, part].tolist(), codebook, symmetric, grid)
            error = float((w[row, part].double() - back[row, part]).square().sum())
            assert abs(error - best) <= 1e-5 * best + 1e-8 * float(w[row, part].square().sum())
            assert found[row, part].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_their_values(dtype: torch.dtype) -> None:
    w = torch.randn(6, 50).to(dtype)
    if dtype is torch.float64:
        w = w.float().double()  # where both round alike
    for ours, wide in (
        (rtn_quantize(w, group_size=16), rtn_quantize(w.float(), group_size=16)),
        (hqq_quantize(w, group_size=16), hqq_quantize(w.float(), group_size=16)),
    ):
        assert_exact(ours[0], wide[0], "codes")
        assert float((ours[1] - wide[1]).abs().max()) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_hqq_keeps_the_best_zero_point(name: str) -> None:
    """More steps are never worse by the error that they lower, unlike the peer's last step."""
    w = torch.distributions.StudentT(3.0).sample((32, 256))
    losses = []
    with backend(name):
        for iterations in (0, 1, 2, 5, 20, 60):
            w_q = dense(hqq_quantize(w, group_size=64, iterations=iterations), 256, 64)
            losses.append((w - w_q).abs().clamp(min=1e-12).pow(0.7).view(32, 4, 64).sum(2))
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert losses[-1].sum() < 0.97 * losses[0].sum()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_clip_search_is_never_worse(name: str) -> None:
    w = torch.distributions.StudentT(3.0).sample((16, 128))
    with backend(name):
        for codebook, symmetric in CODES:
            options = {"codebook": codebook, "symmetric": symmetric, "group_size": 32}
            errors = [
                (w - dense(rtn_quantize(w, grid=grid, **options), 128, 32, codebook)).square()
                for grid in (1, 20)
            ]
            plain, searched = (e.view(16, 4, 32).sum(2) for e in errors)
            assert bool((searched <= plain * (1 + 1e-5)).all())
            assert searched.sum() < 0.97 * plain.sum()


# bitsandbytes' own table: the mean of |error| over N(0, 1), and its deviation over runs.
EXPECTED = {("nf4", 64): (0.072798, 7.4e-5), ("nf4", 128): (0.076831, 9.1e-5)}
EXPECTED |= {("fp4", 64): (0.096543, 1e-4)}


@pytest.mark.parametrize(("codebook", "g"), EXPECTED)
def test_the_error_on_normal_weights_is_the_known_one(codebook: str, g: int) -> None:
    mean, deviation = EXPECTED[codebook, g]
    w = torch.randn(1024, 1024)
    w_q = dense(rtn_quantize(w, group_size=g, codebook=codebook, grid=1), 1024, g, codebook)
    found = float((w - w_q).abs().mean())
    assert abs(found - mean) < 7 * deviation


@pytest.mark.parametrize("name", BACKENDS)
def test_special_groups(name: str) -> None:
    w = torch.randn(1, 80)
    w[0, 0:16] = 0
    w[0, 17] = torch.nan
    w[0, 33] = -torch.inf
    w[0, 48:64] = 0.3
    w[0, 64:80] = torch.linspace(-3e38, 3e38, 16)
    with backend(name):
        for codebook, symmetric in CODES:
            codes, scale, zero = rtn_quantize(
                w, group_size=16, codebook=codebook, symmetric=symmetric
            )
            back = dense((codes, scale, zero), 80, 16, codebook)[0]
            assert_exact(back[:16], torch.zeros(16), "zeros")
            assert scale[0, 0] == 1
            assert back[16:48].isnan().all()
            assert float((back[48:64] - 0.3).abs().max()) < (0.021 if symmetric else 0.011)
            assert back[64:].isnan().all()
        for round_zero in (False, True):
            back = dense(hqq_quantize(w, group_size=16, round_zero=round_zero), 80, 16)[0]
            assert_exact(back[:16], torch.zeros(16), "zeros")
            assert back[16:48].isnan().all()
            assert float((back[48:64] - 0.3).abs().max()) < 1e-6
            assert back[64:].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-6, 1e6, 1e30])
def test_sizes_of_weights(name: str, size: float, scale_dtype: torch.dtype) -> None:
    """No scale is 0 or infinite; float16's end where they end."""
    w = torch.randn(3, 64) * size
    with backend(name):
        for codes, scale, zero in (
            rtn_quantize(w, group_size=16, scale_dtype=scale_dtype),
            hqq_quantize(w, group_size=16, scale_dtype=scale_dtype),
        ):
            assert bool((scale > 0).all())
            assert bool(scale.isfinite().all())
            assert bool(zero.float().isfinite().all())
            fits = scale_dtype is not torch.float16 or 1e-6 <= size <= 1e4
            if fits and size > 1e-40:
                error = (w - dense((codes, scale, zero), 64, 16)).abs().max() / w.abs().max()
                assert float(error) < 0.3


CONFIGS = (
    ft.PTQ4(),
    ft.PTQ4(group_size=-1, symmetric=True, scale_dtype="float16"),
    ft.PTQ4(codebook="nf4", scale_dtype="bfloat16"),
    ft.PTQ4(method="hqq", group_size=32),
    ft.PTQ4(method="hqq", round_zero=True, scale_dtype="float16"),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.codebook}-{c.group_size}")
def test_a_config_makes_a_weight(config: ft.PTQ4) -> None:
    w = torch.randn(24, 100)
    weight = quantize_weight(w, config)
    assert isinstance(weight, QTensor4)
    assert weight.group_size == (100 if config.group_size == -1 else config.group_size)
    assert (weight.zero is None) == (config.codebook != "int4" or config.symmetric)
    relative = (w - weight.dequantize(torch.float32)).norm() / w.norm()
    assert float(relative) < 0.14
    w[3, 4] = torch.nan
    with pytest.raises(ValueError, match="expected a weight of finite values"):
        quantize_weight(w, config)


BAD = [
    ({"method": "gtpq"}, "method: expected 'rtn' or 'hqq', got 'gtpq'"),
    ({"group_size": 0}, "group_size: expected -1 or at least 1, got 0"),
    ({"group_size": 64.0}, "group_size: expected an integer"),
    ({"codebook": "int3"}, "codebook: expected 'int4' or"),
    ({"scale_dtype": "int8"}, "scale_dtype: expected"),
    ({"grid": 0}, "grid: expected at least 1"),
    ({"symmetric": 1}, "symmetric: expected True or False"),
    ({"method": "hqq", "codebook": "nf4"}, "codebook: expected 'int4' beside"),
    ({"method": "hqq", "symmetric": True}, "symmetric: expected False but"),
    ({"codebook": "nf4", "symmetric": True}, "symmetric: expected False but"),
    ({"round_zero": True}, "round_zero: expected False but"),
    ({"targets": []}, "targets: expected at least one name"),
    ({"targets": "("}, "targets: expected a regular expression"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda v: str(v)[:30])
def test_refused_configs(fields: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ft.PTQ4(**fields)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.codebook}-{c.group_size}")
def test_configs_as_json(config: ft.PTQ4) -> None:
    assert ft.PTQ4.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"one of .*method.*got 'an unknown key'"):
        ft.PTQ4.from_dict({"methid": "rtn"})
