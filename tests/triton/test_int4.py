"""The Triton kernels of 4-bit weights: the product that unpacks its codes, panels, and the plan.

The ops run on every sample in test_registry.py, on the engine that is the default; here the other
one, several tiles, parts and panels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pyfastft as ft
from pyfastft import backend
from pyfastft._op import REGISTRY
from pyfastft.native import _torch_int4
from pyfastft.testing.samples import PRECISIONS, Precision, upcast
from pyfastft.testing.samples.ptq4._weights import Int4Shape
from pyfastft.testing.samples.ptq4.linear import arguments, gradient_arguments
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels import _int4_engine
from pyfastft.triton_kernels._common import INTERPRETED
from pyfastft.triton_kernels._int4_engine import Problem, Tiles
from pyfastft.triton_kernels.ptq4 import _engines, _kernels

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FP32, BF16, FP16 = PRECISIONS[:3]
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)
SMALL = Tiles(block_n=32, block_m=16, block_k=32, num_warps=4, num_stages=2)

# Off every tile; groups of one and of several tiles; a ragged last group; every kind of zero.
SHAPES = (
    (Int4Shape("integers", (19,), 70, 160, 32, zero="uint8"), BF16),
    (Int4Shape("implied", (33,), 33, 96, 128, bias=False), FP16),
    (Int4Shape("fractional", (17,), 40, 100, 64, zero="float", half_scale=True), BF16),
    (Int4Shape("table", (5, 4), 35, 64, 64, codebook="nf4"), BF16),
    (Int4Shape("floats", (18,), 34, 77, 32, zero="float", perm=True), FP32),
)


def check(args: tuple[object, ...], engine: str) -> None:
    with backend("reference"):
        truth, naive = REGISTRY["int4_linear"](*upcast(args)), REGISTRY["int4_linear"](*args)
    with backend("triton"), _int4_engine.forced(engine, SMALL):
        assert str(ft.explain("int4_linear", *args).engine).startswith(engine)
        actual = REGISTRY["int4_linear"](*args)
    assert_accurate(actual, truth, naive)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in _int4_engine.PRODUCT_TILES:
        monkeypatch.setitem(_int4_engine.PRODUCT_TILES, kind, (SMALL,))
    monkeypatch.setattr(_int4_engine, "UNALIGNED_TILES", SMALL)


@needs_kernels
@pytest.mark.parametrize(("shape", "precision"), SHAPES, ids=str)
def test_product(monkeypatch: pytest.MonkeyPatch, shape: Int4Shape, precision: Precision) -> None:
    small_tiles(monkeypatch)
    check(arguments(shape, precision, DEVICE), "product")


@needs_kernels
def test_parts_of_k_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Int4Shape("deep", (17,), 33, 300, 32, zero="uint8")
    args = arguments(shape, FP16, DEVICE)
    small_tiles(monkeypatch)
    many = _engines.TritonKernels
    monkeypatch.setattr(many, "__init__", lambda self, device: setattr(self, "multiprocessors", 9))
    assert _int4_engine.parts_of(300, 32, 4, 9) == (2, 160)
    check(args, "product")


@needs_kernels
@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["", "perm"])
def test_panels_are_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, perm: bool
) -> None:
    """Forward and every gradient, through panels that W needs several of."""
    monkeypatch.setattr(_int4_engine, "PANEL_BYTES", 1)
    monkeypatch.setattr(_int4_engine, "PANEL_MULTIPLE", 24)
    shape = Int4Shape("panels", (9,), 53, 74, 16, zero="float", perm=perm)
    sizes = []
    dequantize = _kernels.dequantize

    def watched(out: torch.Tensor, *rest: object, **options: object) -> None:
        sizes.append(tuple(out.shape))
        dequantize(out, *rest, **options)

    monkeypatch.setattr(_kernels, "dequantize", watched)
    check(arguments(shape, precision, DEVICE), "panels")
    assert sizes == [(24, 74), (24, 74), (5, 74)]
    args = gradient_arguments(shape, (True,) * 4, precision, DEVICE)
    with backend("reference"):
        op = REGISTRY["int4_linear_backward"]
        truth, naive = op(*upcast(args)), op(*args)
    with backend("triton"):
        actual = op(*args)
    for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
        assert_accurate(a, t, n, gradient=True, what=f"output {i}")
    assert sizes[3:7] == [(53, 24), (53, 24), (53, 24), (53, 2)]


@needs_kernels
def test_a_column_that_is_none_is_not_written() -> None:
    codes = torch.full((2, 4), 0x99, dtype=torch.uint8, device=DEVICE)
    scale = torch.ones(2, 1, device=DEVICE)
    perm = torch.tensor([0, 1, 2, 3, 4, 5, -1, 8], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(2, 8, device=DEVICE)
    weight = _torch_int4.weight_of(codes, scale, None, 8, 8, "int4")
    _kernels.dequantize(out, weight, perm=perm)
    assert_exact(out.cpu(), torch.tensor([[1.0] * 6 + [0.0] * 2] * 2))


# -- the plan --------------------------------------------------------------------------------------

PROBLEM = Problem(16, 4096, 4096, 128, "bfloat16", "none", table=False, aligned=True)
ALL = _int4_engine.ENGINES


def test_without_measurements_panels_run() -> None:
    choice = _int4_engine.plan(PROBLEM, "no such device", ALL)
    assert choice.engine == "panels"
    assert "nothing has been measured" in choice.why


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which mma was measured to be fastest at the problem's sizes."""
    import json

    names = (*_int4_engine.SAME, *_int4_engine.NEAR)
    row = {name: getattr(PROBLEM, name) for name in names}
    rows = [{**row, "engine": "mma", "tiles": None}]
    rows.append({**row, "m": 512, "engine": "product", "tiles": [128, 64, 64, 8, 3, False]})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"a GPU": {"provenance": {}, "rows": rows}}))
    monkeypatch.setattr(_int4_engine, "TABLE", path)
    _int4_engine.forget()
    yield "a GPU"
    monkeypatch.undo()
    _int4_engine.forget()


def test_a_measurement_is_followed_where_it_reaches(measured: str) -> None:
    def engine(**changes: object) -> str:
        return _int4_engine.plan(replace(PROBLEM, **changes), measured, ALL).engine

    assert engine() == engine(m=32, n=8192) == "mma"
    assert engine(m=512) == "product"
    assert engine(m=100) == engine(group_size=64) == engine(aligned=False) == "panels"
    assert _int4_engine.plan(PROBLEM, measured, ("panels", "product")).engine == "panels"
    tiles = _int4_engine.plan(replace(PROBLEM, m=512), measured, ALL).tiles
    assert tiles == Tiles(128, 64, 64, 8, 3)


@pytest.mark.parametrize(
    ("engine", "changes", "why"),
    [
        ("gemv", {"m": 5}, "at most 4 rows"),
        ("gemv", {"m": 1, "group_size": 40}, "a multiple of 16"),
        ("mma", {"m": 65}, "at most 64 rows"),
        ("mma", {"dtype": "float32"}, "a half dtype"),
        ("mma", {"k": 4080}, "a multiple of 32"),
        ("mma", {"aligned": False}, "begin at multiples of 16 bytes"),
        ("product", {"group_size": 48}, "a multiple of 32"),
    ],
)
def test_what_an_engine_cannot_do_runs_in_panels(
    engine: str, changes: dict[str, object], why: str
) -> None:
    with _int4_engine.forced(engine):
        choice = _int4_engine.plan(replace(PROBLEM, **changes), "any", ALL)
    assert choice.engine == "panels"
    assert why in choice.why


def test_parts_cover_k_and_none_is_empty() -> None:
    for k in (1, 31, 32, 4096, 14336):
        for tile in (32, 128):
            for programs in (1, 40, 1000):
                splits, part = _int4_engine.parts_of(k, tile, programs, 132)
                assert (splits - 1) * part < k <= splits * part
                assert part % tile == 0
        for engine in ("gemv", "mma"):
            for n in (1, 128, 4096, 100_000):
                problem = replace(PROBLEM, m=1, n=n, k=k)
                splits = _int4_engine.splits_of(engine, problem, 132)
                assert 1 <= splits <= max(1, k // 512)


def test_no_engine_of_that_name() -> None:
    with (
        pytest.raises(ValueError, match="expected panels, gemv, mma, product or auto"),
        _int4_engine.forced("marlin"),
    ):
        pass
