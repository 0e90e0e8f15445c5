"""The fused products of Triton against the float64 reference, and the choice of an engine.

Without a GPU the kernels run in Triton's interpreter, repaired by conftest.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import pyfastft  # noqa: E402
from pyfastft._op import REGISTRY, backend  # noqa: E402
from pyfastft._random import dropout_threshold  # noqa: E402
from pyfastft.reference._dropout import dropout, keep_mask  # noqa: E402
from pyfastft.testing.samples import PRECISIONS, Precision, Sample, samples, upcast  # noqa: E402
from pyfastft.testing.tolerance import assert_accurate, assert_exact  # noqa: E402
from pyfastft.triton_kernels import _engine  # noqa: E402
from pyfastft.triton_kernels._common import INTERPRETED  # noqa: E402
from pyfastft.triton_kernels._engine import (  # noqa: E402
    MASKED_TILES,
    UNALIGNED_TILES,
    Choice,
    Problem,
    Tiles,
)
from pyfastft.triton_kernels._plan import Device  # noqa: E402
from pyfastft.triton_kernels.lora import _fused  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
P = 0.3
THRESHOLD = dropout_threshold(P)
LARGE_TILES = _engine.FUSED_TILES["half", True][0]
# (M, N, K, R): off every tile and several of them, more than one band of row tiles, a rank that
# goes through in steps; sizes with groups of 8; one of each.
SHAPES = ((150, 35, 37, 5), (33, 72, 40, 70), (1, 1, 1, 1))
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)
pytestmark = needs_kernels


def rng() -> torch.Tensor:
    return torch.tensor((0x7234567890ABCDEF, (5 << 32) + 7), device=DEVICE)


class Operands:
    """Operands of a layer in one precision; rows of x and of the gradient stand in wider ones."""

    def __init__(self, shape: tuple[int, int, int, int], precision: Precision) -> None:
        m, n, k, r = shape
        base, adapter = precision.base, precision.adapter
        self.x = torch.randn(m, k + 3).to(DEVICE, base)[:, :k]
        self.grad = torch.randn(m, n + 5).to(DEVICE, base)[:, :n]
        self.weight = (torch.randn(n, k) / k**0.5).to(DEVICE, base)
        self.bias = torch.randn(n).to(DEVICE, base)
        self.a = (torch.randn(r, k) / k**0.5).to(DEVICE, adapter)
        self.b = torch.randn(n, r).to(DEVICE, adapter)
        self.xa = torch.randn(m, r).to(DEVICE, adapter)
        self.t = torch.randn(m, r).to(DEVICE)
        self.scaling = torch.tensor([0.75], device=DEVICE)

    def double(self, *names: str) -> list[torch.Tensor]:
        return [getattr(self, name).double() for name in names]


def unwritten(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=like.dtype, device=DEVICE)


@pytest.mark.parametrize("tiles", [MASKED_TILES, LARGE_TILES], ids=["small", "large"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids="m{0[0]}n{0[1]}k{0[2]}r{0[3]}".format)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_base_up(
    precision: Precision, shape: tuple[int, int, int, int], with_bias: bool, tiles: Tiles
) -> None:
    o = Operands(shape, precision)
    bias = o.bias if with_bias else None
    y = unwritten(*shape[:2], like=o.x)
    common = {"weight": o.weight, "bias": bias, "lora_b": o.b, "scaling": o.scaling}
    _fused.base_up(y=y, x=o.x, u=o.xa, tiles=tiles, **common)
    x, w, xa, b, s = o.double("x", "weight", "xa", "b", "scaling")
    truth = torch.nn.functional.linear(x, w, None if bias is None else bias.double())
    naive = torch.nn.functional.linear(o.x, o.weight, bias)
    naive = naive + (o.xa @ o.b.T * o.scaling.to(precision.adapter)).to(precision.base)
    assert_accurate(y, truth + s * (xa @ b.T), naive, what="y")


@pytest.mark.parametrize("tiles", [MASKED_TILES, UNALIGNED_TILES], ids=["small", "large"])
@pytest.mark.parametrize("shape", SHAPES, ids="m{0[0]}n{0[1]}k{0[2]}r{0[3]}".format)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_base_dx(precision: Precision, shape: tuple[int, int, int, int], tiles: Tiles) -> None:
    m, _, k, _ = shape
    o = Operands(shape, precision)
    for p in (P, 0.0):
        threshold = dropout_threshold(p)
        dx = unwritten(m, k, like=o.x)
        common = {"weight": o.weight, "lora_a": o.a, "scaling": o.scaling, "tiles": tiles}
        _fused.base_dx(dx=dx, grad=o.grad, t=o.t, rng=rng(), threshold=threshold, **common)
        grad, w, t, a, s = o.double("grad", "weight", "t", "a", "scaling")
        truth = grad @ w + dropout(s * t @ a, p, rng())
        low_rank = dropout((o.scaling * o.t).to(precision.adapter) @ o.a, p, rng())
        naive = o.grad @ o.weight + low_rank.to(precision.base)
        assert_accurate(dx, truth, naive, gradient=True, what=f"dx at p={p}")


def test_operands_of_any_strides() -> None:
    """A transposed weight, and one whose rows and columns both have strides."""
    o = Operands((20, 33, 40, 4), PRECISIONS[0])
    common = {"bias": o.bias, "u": o.xa, "lora_b": o.b, "scaling": o.scaling}
    expected = unwritten(20, 33, like=o.x)
    _fused.base_up(y=expected, x=o.x, weight=o.weight, tiles=UNALIGNED_TILES, **common)
    spread = torch.zeros(66, 120, device=DEVICE)[::2, ::3]
    spread.copy_(o.weight)
    for weight in (o.weight.T.contiguous().T, spread):
        y = unwritten(20, 33, like=o.x)
        _fused.base_up(y=y, x=o.x, weight=weight, tiles=UNALIGNED_TILES, **common)
        assert_exact(y, expected, "y")


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=str)
def test_operands_through_descriptors(precision: Precision) -> None:
    """The same bits as through pointers, for a weight of either order, off every tile. float32,
    which stands first, has no tiles with descriptors."""
    m, n, k, r = 33, 72, 40, 20
    o = Operands((m, n, k, r), precision)
    o.x, o.grad = o.x.contiguous(), o.grad.contiguous()
    pointers = Tiles(16, 32, 32, 4, 2)
    drop = {"rng": rng(), "threshold": THRESHOLD}
    for weight in (o.weight, o.weight.T.contiguous().T):
        ys, dxs = [], []
        for tiles in (pointers, replace(pointers, tma=True)):
            y, dx = unwritten(m, n, like=o.x), unwritten(m, k, like=o.x)
            common = {"weight": weight, "scaling": o.scaling, "tiles": tiles}
            _fused.base_up(y=y, x=o.x, bias=o.bias, u=o.xa, lora_b=o.b, **common)
            _fused.base_dx(dx=dx, grad=o.grad, t=o.t, lora_a=o.a, **drop, **common)
            ys.append(y)
            dxs.append(dx)
        assert_exact(ys[1], ys[0], "y")
        assert_exact(dxs[1], dxs[0], "dx")


@pytest.mark.parametrize("k", [40, 37], ids=["grouped", "by-element"])
@pytest.mark.parametrize("tiles", [MASKED_TILES, LARGE_TILES], ids=["small", "large"])
def test_the_mask_is_that_of_the_forward(k: int, tiles: Tiles) -> None:
    """With no base product and a low-rank part of ones, dX is the mask, scaled."""
    m = 19
    dx = unwritten(m, k, like=torch.empty(0))
    one = torch.ones(1, device=DEVICE)
    _fused.base_dx(
        dx=dx,
        grad=torch.zeros(m, 2, device=DEVICE),
        weight=torch.zeros(2, k, device=DEVICE),
        t=one.expand(m, 1).contiguous(),
        lora_a=one.expand(1, k).contiguous(),
        scaling=one,
        rng=rng(),
        threshold=THRESHOLD,
        tiles=tiles,
    )
    assert_exact(dx != 0, keep_mask(m * k, THRESHOLD, rng()).view(m, k), "mask")
    assert_exact(dx, dropout(torch.ones(m, k, device=DEVICE), P, rng()), "scaled mask")


def test_nothing_under_the_mask_leaks() -> None:
    m, k = 16, 64
    dx = unwritten(m, k, like=torch.empty(0))
    ones = {"grad": torch.ones(m, 3, device=DEVICE), "weight": torch.ones(3, k, device=DEVICE)}
    _fused.base_dx(
        dx=dx,
        t=torch.full((m, 1), float("inf"), device=DEVICE),
        lora_a=torch.ones(1, k, device=DEVICE),
        scaling=torch.ones(1, device=DEVICE),
        rng=rng(),
        threshold=THRESHOLD,
        tiles=UNALIGNED_TILES,
        **ones,
    )
    keep = keep_mask(m * k, THRESHOLD, rng()).view(m, k)
    expected = torch.where(keep, float("inf"), torch.full((m, k), 3.0, device=DEVICE))
    assert_exact(dx, expected, "dx")


@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["whole", "parts"])
@pytest.mark.parametrize("gate", ["no-gate", "gate", "gate-per-row"])
@pytest.mark.parametrize("shape", [(13, 67, 300, 5), (1, 40, 24, 20)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_decode(
    precision: Precision,
    shape: tuple[int, int, int, int],
    gate: str,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_fused, "device_of", lambda _: Device(multiprocessors, (9, 0)))
    check_decode(Operands(shape, precision), shape, precision, gate)


@pytest.mark.parametrize("rows", [17, 64])
def test_decode_of_more_rows_than_a_matrix_instruction(rows: int) -> None:
    shape = (rows, 70, 130, 33)
    check_decode(Operands(shape, PRECISIONS[1]), shape, PRECISIONS[1], "gate-per-row")


def check_decode(
    o: Operands, shape: tuple[int, int, int, int], precision: Precision, gate: str
) -> None:
    m, n, k, r = shape
    gates = {"gate": torch.randn(1, r), "gate-per-row": torch.randn(m, r)}
    g = gates[gate].to(DEVICE, precision.adapter) if gate in gates else None
    names = (str(dtype).removeprefix("torch.") for dtype in (precision.base, precision.adapter))
    problem = Problem("forward", m, n, k, r, *names, dropout=False, aligned=False)
    y, xa = unwritten(m, n, like=o.x), unwritten(m, r, like=o.a)
    factors = {"lora_a": o.a, "lora_b": o.b, "bias": o.bias, "gate": g, "scaling": o.scaling}
    for tiles in _engine.candidates("decode", problem):
        _fused.decode(y=y, xa=xa, x=o.x, weight=o.weight, tiles=tiles, **factors)
        op_gate = g[0] if gate == "gate" else g
        args = (o.x, o.weight, o.a, o.b, o.bias, o.scaling, 0.0, None, op_gate, None, None)
        with backend("reference"):
            truth, naive = (REGISTRY["lora_linear"](*some) for some in (upcast(args), args))
        assert_accurate(xa, truth[1], naive[1], what="xa")
        assert_accurate(y, truth[0], naive[0], what="y")


FORCED = [
    pytest.param(engine, sample, id=f"{sample.op}-{engine}-{sample}")
    for engine, ops in (
        ("fused", ("lora_linear", "lora_linear_backward")),
        ("decode", ("lora_linear",)),
    )
    for op in ops
    for sample in samples(op)
    if not sample.large
]


@pytest.mark.parametrize("precision", PRECISIONS[1::2], ids=str)
@pytest.mark.parametrize(("engine", "sample"), FORCED)
def test_the_op_on_a_forced_engine(sample: Sample, precision: Precision, engine: str) -> None:
    op = REGISTRY[sample.op]
    args = sample.build(precision, DEVICE)
    if op.impl("triton").unsupported(*args):
        pytest.skip("this sample is not Triton's")
    with _engine.forced(engine), backend("triton"):
        actual = op(*args)
    with backend("reference"):
        truth, naive = op(*upcast(args)), op(*args)
    gradient = sample.op.endswith("_backward")
    for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
        assert_accurate(a, t, n, gradient=gradient, what=f"output {i} of {sample}")


def test_a_forced_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine launches its own kernels, and gemm none of these."""
    launched: list[str] = []
    for name in ("base_up", "base_dx", "decode"):
        call = getattr(_fused, name)
        monkeypatch.setattr(
            _fused, name, lambda name=name, call=call, **k: (launched.append(name), call(**k))
        )
    x = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    w, a, b = (torch.randn(*size, device=DEVICE) for size in ((8, 16), (2, 16), (8, 2)))
    b.requires_grad_()
    expected = {
        "gemm": [],
        "fused": ["base_up", "base_dx"],
        "decode": ["decode"],
        "auto": [],
    }
    for engine, names in expected.items():
        launched.clear()
        with _engine.forced(engine), backend("triton"):
            pyfastft.lora_linear(x, w, a, b).sum().backward()
        assert launched == names, engine


def test_explain_says_which_engine_and_why() -> None:
    x, w, a, b = (torch.randn(*s, device=DEVICE) for s in ((4, 16), (8, 16), (2, 16), (8, 2)))
    with backend("triton"):
        assert "triton, engine gemm: nothing has been measured on" in str(
            pyfastft.explain("lora_linear", x, w, a, b, None, torch.ones((), device=DEVICE))
        )
        with _engine.forced("decode"):
            explanation = pyfastft.explain("lora_linear", x, w, a, b, None, torch.ones(()))
            assert explanation.engine == "decode: decode is forced"


@pytest.mark.parametrize("direction", ["lora_linear", "lora_linear_backward"])
def test_a_base_that_is_only_packed_is_refused(direction: str) -> None:
    """Without the plain weight there would be no base product, silently."""
    op = REGISTRY[direction]
    values = next(samples(direction)).build(PRECISIONS[0], DEVICE)
    args = dict(zip(op.parameters, values, strict=True))
    assert op.impl("triton").unsupported(*args.values()) is None
    for name in ("packed", "packed_dx"):
        packed = {**args, "weight": None, name: torch.zeros(8, dtype=torch.uint8)}
        assert "only as packed" in op.impl("triton").unsupported(*packed.values())


# -- the choice ------------------------------------------------------------------------------------

PROBLEM = Problem("forward", 8192, 4096, 4096, 16, "bfloat16", "bfloat16", True, aligned=True)
DECODE = replace(PROBLEM, m=4, dropout=False)


def row(problem: Problem, engine: str, tiles: Tiles | None) -> dict[str, Any]:
    names = ("direction", "m", "n", "k", "r", "dtype", "adapter", "dropout")
    found = {name: getattr(problem, name) for name in names}
    return {**found, "engine": engine, "tiles": list(vars(tiles).values()) if tiles else None}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts rows in the place of the committed measurements."""

    def put(*rows: dict[str, Any]) -> None:
        monkeypatch.setattr(_engine, "table", lambda: {"a GPU": {"rows": list(rows)}})
        _engine.forget()

    yield put
    _engine.forget()


def test_without_a_measurement_gemm_runs(measured: Any) -> None:
    measured()
    assert _engine.plan(PROBLEM, "a GPU").engine == "gemm"
    assert "nothing has been measured on another" in _engine.plan(PROBLEM, "another").why


def test_a_measurement_speaks_for_what_is_near(measured: Any) -> None:
    tiles = _engine.candidates("fused", PROBLEM)[1]
    measured(
        row(PROBLEM, "fused", tiles),
        row(replace(PROBLEM, m=1024), "gemm", None),
        row(replace(PROBLEM, m=2048, dtype="float16", adapter="float16"), "fused", tiles),
    )
    near = replace(PROBLEM, m=8192 - 512, k=5120)
    assert _engine.plan(near, "a GPU") == Choice("fused", _engine.plan(near, "a GPU").why, tiles)
    for other in (
        replace(PROBLEM, m=1024),
        replace(PROBLEM, m=2048),
        replace(PROBLEM, k=16384),
        replace(PROBLEM, r=64),
        replace(PROBLEM, dropout=False),
        replace(PROBLEM, adapter="float32"),
        replace(PROBLEM, direction="backward"),
        replace(PROBLEM, aligned=False),
    ):
        assert _engine.plan(other, "a GPU").engine == "gemm", other


def test_a_measured_decode_takes_a_tile_for_its_rows(measured: Any) -> None:
    tiles = replace(_engine.candidates("decode", DECODE)[0], block_m=16)
    measured(row(replace(DECODE, m=16), "decode", tiles))
    assert _engine.plan(replace(DECODE, m=20), "a GPU").tiles == replace(tiles, block_m=32)


def test_tiles_that_are_no_longer_offered_are_not_launched(measured: Any) -> None:
    measured(row(PROBLEM, "fused", Tiles(512, 512, 512, 8, 9)))
    choice = _engine.plan(PROBLEM, "a GPU")
    assert choice.engine == "gemm"
    assert "outdated" in choice.why


def test_what_is_forced_runs_where_it_can() -> None:
    with _engine.forced("decode"):
        assert _engine.plan(DECODE, "a GPU").engine == "decode"
        for impossible in (
            replace(DECODE, m=65),
            replace(DECODE, r=65),
            replace(DECODE, dropout=True),
            replace(DECODE, direction="backward"),
            replace(DECODE, adapter="float32", r=33),
        ):
            choice = _engine.plan(impossible, "a GPU")
            assert (choice.engine, "decode is forced, but" in choice.why) == ("gemm", True)
    with _engine.forced("fused"):
        assert _engine.plan(PROBLEM, "a GPU").tiles == _engine.candidates("fused", PROBLEM)[0]
    expected = pytest.raises(ValueError, match="gemm, fused, decode or auto, got 'cublas'")
    with expected, _engine.forced("cublas"):
        pass


def test_the_committed_measurements_can_be_launched() -> None:
    for device, measurement in json.loads(Path(_engine.TABLE).read_text()).items():
        for one in measurement["rows"]:
            sizes = {name: one[name] for name in (*_engine.SAME, *_engine.NEAR)}
            assert math.prod(one[name] for name in _engine.NEAR) > 0
            choice = _engine.plan(Problem(**sizes, aligned=True), device)
            assert (choice.engine, "outdated" in choice.why) == (one["engine"], False)
