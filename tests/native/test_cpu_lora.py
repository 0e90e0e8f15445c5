"""The CPU kernels of the lora family: every level of the instruction set, tile edges, strides,
threads, masks. What every backend must do is in tests/ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from pyfastft import _native
from pyfastft._op import REGISTRY, backend
from pyfastft._random import dropout_threshold
from pyfastft.native._packing import pack
from pyfastft.reference._dropout import keep_mask
from pyfastft.testing.samples import FLOAT64, PRECISIONS, Precision, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)

FORWARD = "lora_linear"
BACKWARD = "lora_linear_backward"
NAMES = ("dx", "dweight", "dlora_a", "dlora_b", "dbias", "dscaling", "dgate")
ALL = [True] * 6 + [False]
FLOAT32, BFLOAT16 = PRECISIONS[:2]
NO_MORE = (None, None, None)  # gate, packed, packed_dx
RNG = (0x0123456789ABCDEF, 0x7EDCBA9876543210)


def levels() -> list[str]:
    if _native.why_no_cpu() is not None:
        return []
    return list(_native.ISA_LEVELS[: _native.cpu().isa()[0] + 1])


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with _native.cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Threads change no bit, which has its own test; waking them costs most of these."""
    torch.set_num_threads(1)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def forward_arguments(m, n, k, r, precision: Precision, p: float = 0.1, gate=None):
    """``gate``: None, "ranks" (one for all rows) or "rows" (one for each)."""
    base, adapter = precision.base, precision.adapter
    gates = {"ranks": (r,), "rows": (m, r)}
    return (
        draw(m, k, dtype=base),
        draw(n, k, dtype=base, scale=max(k, 1) ** -0.5),
        draw(r, k, dtype=adapter, scale=max(k, 1) ** -0.5),
        draw(n, r, dtype=adapter, scale=r**-0.5),
        draw(n, dtype=base),
        torch.tensor(0.75),
        p,
        torch.tensor(RNG) if p else None,
        None if gate is None else 0.5 + draw(*gates[gate], dtype=adapter).abs(),
        None,
        None,
    )


def backward_arguments(forward, need=ALL):
    x, weight, lora_a, lora_b, _, scaling, p, rng, gate, packed, packed_dx = forward
    grad = draw(x.shape[0], lora_b.shape[0], dtype=x.dtype)
    with backend("reference"):
        xa = REGISTRY[FORWARD](*forward)[1]
    needs = [*need[:6], gate is not None]
    operands = (grad, x, weight, lora_a, lora_b, xa, scaling, p, rng, gate, packed, packed_dx)
    return *operands, needs


def run(op: str, args, name: str = "cpu"):
    with backend(name):
        return REGISTRY[op](*args)


def assert_agrees(op: str, args) -> None:
    """Every output that is a matrix or a vector, against the reference in float64.

    dscaling is one number, so the naive result's error is a sample of one, and often near zero by
    luck: it is held to the error that rounding T alone can cause instead.
    """
    outputs = run(op, args)
    truth = run(op, upcast(args), "reference")
    naive = run(op, args, "reference")
    names = NAMES if op == BACKWARD else ("y", "xa")
    for name, actual, true, plain in zip(names, outputs, truth, naive, strict=True):
        if name == "dscaling" and actual.numel():
            grad, lora_b, xa = args[0].double(), args[4].double(), args[5].double()
            gate = 1 if args[9] is None else args[9].double()
            terms = (grad.abs() @ lora_b.abs() * (gate * xa).abs()).sum()
            assert actual.sub(true).abs() <= torch.finfo(torch.float32).eps * terms, name
        else:
            assert_accurate(actual, true, plain, gradient=op == BACKWARD, what=name)


# One below, at and above the edges of register tiles, strips, blocks and depth blocks.
SIZES = [
    (1, 1, 1, 1),
    (1, 33, 129, 1),
    (2, 40, 70, 3),
    (7, 15, 63, 15),
    (14, 32, 64, 14),
    (15, 31, 65, 16),
    (29, 97, 383, 29),
    (223, 65, 31, 5),
    (226, 258, 17, 8),
    (57, 257, 385, 33),
    (450, 34, 100, 2),
    (33, 20, 1537, 4),
    # Few rows, whose columns are read in place: one run of depth or several.
    (1, 260, 1025, 8),
    (3, 1031, 270, 2),
    (4, 255, 2055, 1),
    (5, 40, 1030, 4),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes_around_the_tiles(level: str, size, precision: Precision) -> None:
    forward = forward_arguments(*size, precision)
    assert_agrees(FORWARD, forward)
    assert_agrees(BACKWARD, backward_arguments(forward))


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "strided-everything"])
@pytest.mark.parametrize("m", [1, 3, 37])
def test_strides(level: str, m: int, layout: str, precision: Precision) -> None:
    n, k, r = 50, 67, 5
    dtype = precision.base
    forward = list(forward_arguments(m, n, k, r, precision, p=0.3))
    grad = draw(m, n, dtype=dtype)
    if layout == "transposed":
        forward[0] = draw(k, m, dtype=dtype).T
        forward[1] = draw(k, n, dtype=dtype, scale=k**-0.5).T
        grad = draw(n, m, dtype=dtype).T
    elif layout == "sliced":
        forward[0] = draw(m, 2 * k, dtype=dtype)[:, k:]
        forward[1] = draw(n, 3 * k, dtype=dtype, scale=k**-0.5)[:, 1 : k + 1]
        grad = draw(2 * m, n, dtype=dtype)[::2]
    elif layout == "expanded":
        forward[0] = draw(1, k, dtype=dtype).expand(m, k)
        grad = torch.full((), 0.5, dtype=dtype).expand(m, n)
    else:
        forward[0] = draw(m, 3 * k, dtype=dtype)[:, ::3]
        forward[1] = draw(2 * n, 2 * k, dtype=dtype, scale=k**-0.5)[::2, 1::2]
        forward[2] = draw(k, 2 * r, dtype=dtype, scale=k**-0.5).T[::2]
        forward[3] = draw(n, 2 * r, dtype=dtype)[:, ::2]
        forward[4] = draw(2 * n, dtype=dtype)[::2]
        grad = draw(m, 2 * n, dtype=dtype)[:, 1::2]
    assert_agrees(FORWARD, tuple(forward))
    assert_agrees(BACKWARD, (grad, *backward_arguments(tuple(forward))[1:]))


@pytest.mark.parametrize("size", [(0, 5, 7, 2), (4, 0, 7, 2), (4, 5, 0, 2), (0, 0, 0, 1)])
def test_empty(level: str, size) -> None:
    forward = forward_arguments(*size, FLOAT32)
    assert_agrees(FORWARD, forward)
    assert_agrees(BACKWARD, backward_arguments(forward))


def test_every_combination_of_gradients(level: str) -> None:
    forward = forward_arguments(19, 34, 41, 3, FLOAT32)
    args = list(backward_arguments(forward))
    full = run(BACKWARD, tuple(args))
    for need in itertools.product([False, True], repeat=6):
        partial = list(args)
        partial[-1] = [*need, False]
        partial[1] = args[1] if need[1] or need[2] else None
        partial[5] = args[5] if need[3] or need[5] else None
        for name, wanted, some, every in zip(
            NAMES[:6], need, run(BACKWARD, tuple(partial)), full, strict=False
        ):
            if wanted:
                assert_exact(some, every, name)
            else:
                assert some.numel() == 0


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("k", [1, 8, 13, 67])
def test_mask_is_the_references(level: str, k: int, p: float) -> None:
    """Probed: with A the identity xa is dropout(x); with T A = 1 and W = 0 dx is the mask."""
    m = 21
    rng = torch.tensor(RNG)
    keep = keep_mask(m * k, dropout_threshold(p), rng).view(m, k)
    ones, eye = torch.ones(m, k), torch.eye(k)
    nothing = torch.zeros(1, k)
    scaling = torch.tensor(1.0)
    lora_b = torch.zeros(1, k)
    _, xa = run(FORWARD, (ones, nothing, eye, lora_b, None, scaling, p, rng, *NO_MORE))
    assert_exact(xa != 0, keep, "the forward's mask")
    dx, _, dlora_a, *_ = run(
        BACKWARD,
        (
            torch.ones(m, 1),
            ones,
            nothing,
            torch.ones(1, k),
            torch.ones(1, 1),
            None,
            scaling,
            p,
            rng,
            *NO_MORE,
            [True, False, True, False, False, False, False],
        ),
    )
    assert_exact(dx != 0, keep, "the mask of dx")
    assert_exact(dlora_a[0] != 0, keep.any(0), "the mask of dlora_a")


def test_dropped_elements_are_not_read_and_kept_ones_are(level: str) -> None:
    m, n, k, r, p = 40, 20, 24, 3, 0.5
    for precision in (FLOAT32, BFLOAT16):
        x, weight, lora_a, lora_b, bias, scaling, _, rng, *_ = forward_arguments(
            m, n, k, r, precision, p
        )
        keep = keep_mask(m * k, dropout_threshold(p), rng).view(m, k)
        clean = run(FORWARD, (x, weight, lora_a, lora_b, bias, scaling, p, rng, *NO_MORE))[1]
        poisoned = torch.where(keep, x, torch.nan)
        args = (poisoned, weight, lora_a, lora_b, bias, scaling, p, rng, *NO_MORE)
        assert_exact(run(FORWARD, args)[1], clean, "xa with NaN under the mask")
        gradients = list(backward_arguments((x, *args[1:])))
        plain = run(BACKWARD, tuple(gradients))[2]
        gradients[1] = poisoned
        assert_exact(run(BACKWARD, tuple(gradients))[2], plain, "dA with NaN under the mask")
        row, column = (int(i) for i in keep.nonzero()[7])
        x[row, column] = torch.nan
        xa = run(FORWARD, (x, *args[1:]))[1]
        assert xa[row].isnan().all()
        assert int(xa.isnan().any(1).sum()) == 1


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 300, 500, 16), (3, 1100, 700, 4), (230, 300, 200, 20), (500, 100, 96, 8)]
)
def test_bits_do_not_depend_on_threads_or_runs(size, precision: Precision) -> None:
    forward = forward_arguments(*size, precision)
    backward = backward_arguments(forward)
    torch.set_num_threads(1)
    first = (*run(FORWARD, forward), *run(BACKWARD, backward))
    for repeat in range(20):
        torch.set_num_threads(1 + repeat % 3)
        again = (*run(FORWARD, forward), *run(BACKWARD, backward))
        for expected, actual in zip(first, again, strict=True):
            assert_exact(actual, expected, f"run {repeat}")


def test_operands_too_large_to_be_packed_at_once() -> None:
    assert_agrees(FORWARD, forward_arguments(1000, 1200, 4200, 4, FLOAT32))


def test_rows_do_not_depend_on_each_other(level: str) -> None:
    """An infinite weight or input stays in its own row and column: packing pads with zeros."""
    x, weight, *rest = forward_arguments(43, 35, 20, 3, FLOAT32, p=0.0)
    x[5, 3], weight[7, 2] = torch.inf, -torch.inf
    assert_agrees(FORWARD, (x, weight, *rest))


def test_subnormals_survive(level: str) -> None:
    tiny = 2.0**-140
    x = torch.full((3, 5), tiny)
    weight = torch.eye(5)
    zeros = torch.zeros(1, 5), torch.zeros(5, 1)
    y, _ = run(FORWARD, (x, weight, *zeros, None, torch.tensor(1.0), 0.0, None, *NO_MORE))
    assert_exact(y, x)


def test_float64_goes_to_the_reference() -> None:
    explanation = REGISTRY[FORWARD].explain(*upcast(forward_arguments(2, 3, 4, 1, FLOAT32)))
    assert explanation.chosen == "reference"
    assert explanation.reasons["cpu"].startswith(str(FLOAT64.base).removeprefix("torch."))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("gate", ["ranks", "rows"])
@pytest.mark.parametrize("size", [(1, 40, 33, 5), (37, 50, 67, 19), (4, 30, 20, 33)])
def test_gates(level: str, size, gate: str, precision: Precision) -> None:
    forward = forward_arguments(*size, precision, gate=gate)
    assert_agrees(FORWARD, forward)
    assert_agrees(BACKWARD, backward_arguments(forward))


@pytest.mark.parametrize("base", [True, False])
def test_a_strided_gate_and_no_base(level: str, base: bool) -> None:
    forward = list(forward_arguments(23, 31, 40, 6, FLOAT32, gate="rows"))
    forward[8] = forward[8].T.contiguous().T[:, ::1]
    if not base:
        forward[1] = None
    need = [True, base, True, True, True, True]
    assert_agrees(FORWARD, tuple(forward))
    assert_agrees(BACKWARD, backward_arguments(tuple(forward), need))


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize("size", [(1, 33, 65, 2), (4, 40, 17, 3), (37, 70, 401, 5), (9, 5, 1, 1)])
@pytest.mark.parametrize("form", ["both", "forward", "across"])
def test_packed_weights_give_the_same_bits(level: str, size, form: str, precision) -> None:
    """With the plain weight absent: from the form packed for the direction, or read across."""
    forward = forward_arguments(*size, precision)
    need = [True, False, True, True, True, True]
    plain = run(FORWARD, forward), run(BACKWARD, gradients := backward_arguments(forward, need))
    weight = forward[1]
    packed = pack(weight) if form != "across" else None
    packed_dx = pack(weight, transposed=True) if form != "forward" else None
    forward = (forward[0], None, *forward[2:9], packed, packed_dx)
    gradients = (*gradients[:2], None, *gradients[3:10], packed, packed_dx, gradients[12])
    for expected, actual in zip(
        (*plain[0], *plain[1]), (*run(FORWARD, forward), *run(BACKWARD, gradients)), strict=True
    ):
        assert_exact(actual, expected)
    with backend("reference"):
        y, _ = REGISTRY[FORWARD](*forward)
    assert_exact(y, run(FORWARD, (forward[0], weight, *forward[2:]), "reference")[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda packed: packed[:-1], "bytes"),
        (lambda packed: packed[64:], "no packed weight"),
        (lambda packed: packed[:10], "no packed weight"),
        (lambda packed: pack(torch.ones(7, 13)), "(7, 13)"),
        (lambda packed: pack(torch.ones(13, 7).bfloat16()), "dtype code 1"),
    ],
)
def test_another_packed_weight_is_refused(change, says: str) -> None:
    forward = list(forward_arguments(3, 13, 7, 2, FLOAT32))
    forward[9] = change(pack(forward[1]))
    with pytest.raises(ValueError, match="expected packed of this weight") as caught:
        run(FORWARD, tuple(forward))
    assert says in str(caught.value)


def test_a_weight_packed_at_another_level_is_refused() -> None:
    if len(levels()) < 2:
        pytest.skip("one level")
    forward = list(forward_arguments(3, 13, 7, 2, FLOAT32))
    with _native.cpu_isa("scalar"):
        forward[9] = pack(forward[1])
    with pytest.raises(ValueError, match="another instruction set"):
        run(FORWARD, tuple(forward))
