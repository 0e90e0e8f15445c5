"""dX of a 4-bit weight by the Triton kernel that unpacks its codes, alone and with a low-rank term
in its sums. The ops run on every sample in test_registry.py, on the engine that is the default."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import pyfastft as ft
from pyfastft import backend
from pyfastft._op import REGISTRY
from pyfastft.testing.samples import PRECISIONS, Precision, upcast
from pyfastft.testing.samples.ptq4 import linear, lora_linear
from pyfastft.testing.samples.ptq4._weights import Int4Shape
from pyfastft.testing.samples.ptq4.lora_linear import Adapted
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels import _int4_engine
from pyfastft.triton_kernels._common import INTERPRETED
from pyfastft.triton_kernels._int4_engine import Problem, Tiles
from pyfastft.triton_kernels.ptq4 import _engines, _gradient, _kernels

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FP32, BF16, FP16, BF16_WIDE = PRECISIONS[:4]
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)
SMALL = Tiles(block_n=32, block_m=16, block_k=32, num_warps=4, num_stages=2)

# Off every tile; groups of one and of several tiles; a ragged last group; every kind of zero.
BASES = {
    "integers": Int4Shape("integers", (19,), 70, 160, 32, zero="uint8"),
    "implied": Int4Shape("implied", (5,), 33, 96, 128),
    "fractional": Int4Shape("fractional", (17,), 40, 100, 64, zero="float", half_scale=True),
    "table": Int4Shape("table", (5, 4), 35, 64, 64, codebook="nf4"),
    "odd": Int4Shape("odd", (18,), 34, 77, 32, zero="float"),
    "permuted": Int4Shape("permuted", (7,), 45, 96, 32, zero="uint8", perm=True),
}
ONLY_X, WITH_LORA = (True, False, False, False), (True, False, False, True, True, True, True)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in _int4_engine.GRADIENT_TILES:
        monkeypatch.setitem(_int4_engine.GRADIENT_TILES, kind, (SMALL,))
    monkeypatch.setattr(_int4_engine, "UNALIGNED_TILES", SMALL)


def check(name: str, args: tuple[object, ...]) -> tuple[torch.Tensor, ...]:
    op = REGISTRY[name]
    with backend("reference"):
        truth, naive = op(*upcast(args)), op(*args)
    with backend("triton"), _int4_engine.forced("product", SMALL):
        assert str(ft.explain(name, *args).engine).startswith("product")
        actual = op(*args)
    for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
        assert_accurate(a, t, n, gradient=True, what=f"output {i}")
    return actual


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_alone(base: str, precision: Precision) -> None:
    args = linear.gradient_arguments(BASES[base], ONLY_X, precision, DEVICE)
    check("int4_linear_backward", args)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("precision", [FP32, BF16_WIDE], ids=str)
@pytest.mark.parametrize(
    ("base", "r", "p"), [("table", 16, 0.1), ("odd", 17, 0.3), ("permuted", 5, 0.2)]
)
def test_with_a_low_rank_term(
    base: str, r: int, p: float, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same sums, but where the codes' columns are in another order than A's."""
    terms = []
    kernel = _gradient.input_gradient

    def watched(**operands: object) -> None:
        terms.append(operands["low_rank"])
        kernel(**operands)

    monkeypatch.setattr(_gradient, "input_gradient", watched)
    shape = Adapted(BASES[base], r, p)
    args = lora_linear.gradient_arguments(shape, (*WITH_LORA,), precision, DEVICE)
    check("int4_lora_linear_backward", args)
    assert [term is None for term in terms] == [base == "permuted"]


@pytest.mark.usefixtures("small_tiles")
def test_parts_of_n_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The low-rank term is in the first of them alone."""
    made = _engines.TritonKernels
    monkeypatch.setattr(made, "__init__", lambda self, count: setattr(self, "multiprocessors", 9))
    assert _int4_engine.parts_of(300, 32, 4, 9) == (2, 160)
    base = Int4Shape("deep", (17,), 300, 33, 64, codebook="fp4")
    shape = Adapted(base, 4, 0.25)
    args = lora_linear.gradient_arguments(shape, WITH_LORA, FP32, DEVICE)
    first = check("int4_lora_linear_backward", args)
    for one, again in zip(first, check("int4_lora_linear_backward", args), strict=True):
        assert_exact(one, again)


def test_no_panel_of_w_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object, **options: object) -> None:
        raise AssertionError("W was brought out of its codes")

    monkeypatch.setattr(_kernels, "dequantize", made)
    args = linear.gradient_arguments(BASES["table"], ONLY_X, BF16, DEVICE)
    check("int4_linear_backward", args)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [(0, 33), (3, 0)])
def test_sizes_of_zero(shape: tuple[int, int]) -> None:
    m, n = shape
    args = linear.gradient_arguments(
        Int4Shape("empty", (m,), n, 64, 32, zero="uint8"), ONLY_X, FP32, DEVICE
    )
    with backend("triton"), _int4_engine.forced("product", SMALL):
        assert "there is no product" in str(ft.explain("int4_linear_backward", *args).engine)
        assert_exact(REGISTRY["int4_linear_backward"](*args)[0].cpu(), torch.zeros(m, 64))


def test_scales_that_float16_does_not_hold() -> None:
    """Of dY times the scale nothing would be left in float16, of the scaled weight all is."""
    codes = torch.full((32, 32), 0x5A, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((32, 1), 2.0**-10, device=DEVICE)
    grad = torch.full((4, 32), 2.0**-15, device=DEVICE, dtype=torch.float16)
    args = (grad, None, codes, scale, None, None, None, 64, 64, "int4", list(ONLY_X))
    with backend("triton"), _int4_engine.forced("product"):
        dx = REGISTRY["int4_linear_backward"](*args)[0]
    expected = torch.tensor([2.0, -3.0]).repeat(32) * 2.0**-20
    assert_exact(dx.cpu(), expected.half().expand(4, 64))


# -- the plan --------------------------------------------------------------------------------------

BACKWARD = Problem(
    *(512, 4096, 4096, 64, "bfloat16", "none"), table=True, aligned=True, direction="backward"
)


def test_without_measurements_panels_run() -> None:
    choice = _int4_engine.plan(BACKWARD, "no such device", _int4_engine.ENGINES)
    assert choice.engine == "panels"
    assert "nothing has been measured" in choice.why


@pytest.mark.parametrize("engine", ["gemv", "mma"])
def test_engines_that_are_forwards(engine: str) -> None:
    with _int4_engine.forced(engine):
        choice = _int4_engine.plan(replace(BACKWARD, m=1), "any", _int4_engine.ENGINES)
    assert choice.engine == "panels"
    assert f"{engine} is a forward" in choice.why


def test_a_forward_that_was_measured_says_nothing_of_dx() -> None:
    rows = [{name: getattr(BACKWARD, name) for name in (*_int4_engine.SAME, *_int4_engine.NEAR)}]
    found = _int4_engine._measured.nearest
    same, near = _int4_engine.SAME, _int4_engine.NEAR
    assert found(rows, BACKWARD, same, near) is rows[0]
    for change in ({"direction": "forward"}, {"adapter": "float32"}, {"dropout": True}):
        assert found(rows, replace(BACKWARD, **change), same, near) is None
