"""The CUDA kernels on the CPU: the .cu sources, compiled by g++ against ``simt/cuda_runtime.h``,
run under AddressSanitizer and UndefinedBehaviorSanitizer and give what the formulas of
``csrc/include/fastft/api.h`` give in float64. ThreadSanitizer finds no race in them, and does find
one in a kernel that lacks a barrier."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from pyfastft._native import DTYPES
from pyfastft._random import dropout_scale, dropout_threshold
from pyfastft.reference._dropout import keep_mask
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Precision
from pyfastft.testing.tolerance import assert_accurate, assert_exact

if TYPE_CHECKING:
    from conftest import Kernels

RNG = torch.tensor([-0x1234567890ABCDE, 1 << 33])

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


# -- the stages: what the kernels are called with, and the same in PyTorch -------------------------


class Stages:
    """The inputs of one shape, every stage on them, and every stage's formula in any dtype."""

    def __init__(
        self,
        m: int,
        columns: int,
        r: int,
        *,
        precision: Precision = FLOAT32,
        p: float = 0.0,
        padding: int = 0,
        shift: int = 0,
    ) -> None:
        def draw(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.float64).to(dtype)

        # Rows `padding` elements apart, from `shift` elements after an aligned address on.
        stored = draw(m * (columns + padding) + shift, dtype=precision.base)
        self.wide = stored[shift:].as_strided((m, columns), (columns + padding, 1), shift)
        self.add_to = draw(m, columns, dtype=precision.base)
        self.t = draw(m, r, dtype=torch.float32)
        self.a = draw(r, columns, dtype=precision.adapter)
        self.b = draw(columns, r, dtype=precision.adapter)
        # Of the sign of t = wide B: where dscaling = sum(t * xa) cancels, its error is chance.
        sign = (self.wide.double() @ self.b.double()).sign()
        self.xa = (draw(m, r, dtype=torch.float64).abs() * sign).to(precision.adapter)
        self.scaling = torch.tensor([0.75])
        self.m, self.columns, self.r, self.precision = m, columns, r, precision
        self.threshold = dropout_threshold(p)
        self.rng = RNG if p else None

    def empty(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(size, torch.nan, dtype=dtype)

    def dropout(self, value: torch.Tensor) -> torch.Tensor:
        if self.rng is None:
            return value
        keep = keep_mask(value.numel(), self.threshold, self.rng).view(value.shape)
        return torch.where(keep, value * dropout_scale(self.threshold), 0)

    def shared(self) -> dict[str, int | None]:
        base, adapter = DTYPES[self.precision.base], DTYPES[self.precision.adapter]
        return {"m": self.m, "r": self.r, "dtype": base, "adapter_dtype": adapter, "stream": None}

    def masked(self) -> dict[str, torch.Tensor | int | None]:
        return {"rng": self.rng, "threshold": self.threshold, "k": self.columns, **self.shared()}

    def run(self, kernels: Kernels, stage: str) -> tuple[torch.Tensor, ...]:
        base, adapter = self.precision.base, self.precision.adapter
        stride = self.wide.stride(0)
        sizes = (self.m, self.columns, self.r)
        if stage == "down":
            xa = self.empty(self.m, self.r, dtype=adapter)
            kernels.call(
                "lora_down", xa=xa, x=self.wide, lora_a=self.a, x_stride_m=stride, **self.masked()
            )
            return (xa,)
        if stage == "up":
            y = self.add_to.clone()
            kernels.call(
                "lora_up",
                y=y,
                xa=self.xa,
                lora_b=self.b,
                scaling=self.scaling,
                n=self.columns,
                **self.shared(),
            )
            return (y,)
        if stage == "up_grad":
            t = self.empty(self.m, self.r, dtype=torch.float32)
            dlora_b = self.empty(self.columns, self.r, dtype=adapter)
            dscaling = self.empty(1, dtype=torch.float32)
            workspace = kernels.workspace("lora_up_grad", *sizes)
            kernels.call(
                "lora_up_grad",
                t=t,
                dlora_b=dlora_b,
                dscaling=dscaling,
                workspace=workspace,
                grad=self.wide,
                xa=self.xa,
                lora_b=self.b,
                scaling=self.scaling,
                workspace_floats=workspace.numel(),
                n=self.columns,
                grad_stride_m=stride,
                **self.shared(),
            )
            return t, dlora_b, dscaling
        if stage == "down_grad":
            dlora_a = self.empty(self.r, self.columns, dtype=adapter)
            workspace = kernels.workspace("lora_down_grad", *sizes)
            kernels.call(
                "lora_down_grad",
                dlora_a=dlora_a,
                workspace=workspace,
                t=self.t,
                x=self.wide,
                scaling=self.scaling,
                workspace_floats=workspace.numel(),
                x_stride_m=stride,
                **self.masked(),
            )
            return (dlora_a,)
        dx = self.add_to.clone()
        assert dx.dtype == base
        kernels.call(
            "lora_dx", dx=dx, t=self.t, lora_a=self.a, scaling=self.scaling, **self.masked()
        )
        return (dx,)

    def formula(
        self, stage: str, base: torch.dtype, adapter: torch.dtype, wide: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        x, y = self.wide.to(base), self.add_to.to(base)
        t, s = self.t.to(wide), self.scaling.to(wide)
        xa, a, b = (factor.to(adapter) for factor in (self.xa, self.a, self.b))
        if stage == "down":
            return (self.dropout(x).to(adapter) @ a.T,)
        if stage == "up":
            return ((y + s * (xa @ b.T)).to(base),)
        if stage == "up_grad":
            t = x.to(wide) @ b.to(wide)
            return t, (s * (x.to(adapter).T @ xa)).to(adapter), (t * xa).sum().reshape(1)
        if stage == "down_grad":
            return ((s * t.T @ self.dropout(x).to(wide)).to(adapter),)
        return ((y + self.dropout(s * t @ a.to(wide))).to(base),)

    def check(self, kernels: Kernels, stage: str) -> None:
        double, single = torch.float64, torch.float32
        actual = self.run(kernels, stage)
        truth = self.formula(stage, double, double, double)
        naive = self.formula(stage, self.precision.base, self.precision.adapter, single)
        for i, (found, true, plain) in enumerate(zip(actual, truth, naive, strict=True)):
            gradient = stage not in ("down", "up")
            assert_accurate(found, true, plain, gradient, what=f"output {i} of {stage}")


STAGES = ("down", "up", "up_grad", "down_grad", "dx")
SHAPES = {
    "one-element": {"m": 1, "columns": 1, "r": 1, "p": 0.5},
    "odd": {"m": 37, "columns": 301, "r": 17, "p": 0.3},
    "whole-tiles": {"m": 32, "columns": 256, "r": 16, "p": 0.1},
    "high-rank": {"m": 5, "columns": 24, "r": 70},
    "padded-rows": {"m": 19, "columns": 520, "r": 8, "p": 0.1, "padding": 8},
    "padded-oddly": {"m": 18, "columns": 48, "r": 3, "p": 0.1, "padding": 3},
    "unaligned": {"m": 18, "columns": 48, "r": 4, "p": 0.1, "shift": 1},
    "all-dropped": {"m": 3, "columns": 20, "r": 2, "p": 1.0},
}


RUNS = [
    pytest.param(shape, precision, id=f"{shape}-{precision}")
    for shape in SHAPES
    for precision in (PRECISIONS if shape in ("odd", "padded-rows") else PRECISIONS[1:2])
]


@pytest.mark.parametrize(("shape", "precision"), RUNS)
@pytest.mark.parametrize("stage", STAGES)
def test_truth(kernels: Kernels, stage: str, shape: str, precision: Precision) -> None:
    Stages(**SHAPES[shape], precision=precision).check(kernels, stage)


@pytest.mark.parametrize("shape", [(0, 12, 3), (7, 0, 3), (0, 0, 3)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_empty(kernels: Kernels, stage: str, shape: tuple[int, int, int]) -> None:
    Stages(*shape).check(kernels, stage)


@pytest.mark.more
@pytest.mark.parametrize("stage", STAGES)
def test_many_chunks(kernels: Kernels, stage: str) -> None:
    Stages(1100, 600, 40, precision=PRECISIONS[1], p=0.1).check(kernels, stage)


@pytest.mark.parametrize("columns", [16, 21])
def test_mask_is_exact(kernels: Kernels, columns: int) -> None:
    """dx of ones shows the mask itself: scale where kept, untouched where dropped."""
    stages = Stages(9, columns, 1, p=0.4)
    stages.t.fill_(1)
    stages.a.fill_(1)
    stages.scaling.fill_(1)
    stages.add_to.zero_()
    (dx,) = stages.run(kernels, "dx")
    assert_exact(dx, stages.dropout(torch.ones(9, columns)), "the mask")


def test_a_nan_under_the_mask_does_not_leak(kernels: Kernels) -> None:
    stages = Stages(9, 40, 4, p=0.5)
    dropped = ~keep_mask(stages.wide.numel(), stages.threshold, RNG).view(9, 40)
    stages.wide[dropped] = torch.nan
    assert stages.wide.isnan().any()
    assert all(stages.run(kernels, stage)[0].isfinite().all() for stage in ("down", "down_grad"))
    stages.t.fill_(torch.nan)
    (dx,) = stages.run(kernels, "dx")
    assert_exact(dx[dropped], stages.add_to[dropped], "what was dropped")
    assert dx[~dropped].isnan().all()


@pytest.mark.parametrize("wanted", [(), ("dlora_b",), ("dscaling",)], ids=str)
def test_up_grad_computes_what_is_wanted(kernels: Kernels, wanted: tuple[str, ...]) -> None:
    stages = Stages(20, 30, 5)
    t, dlora_b, dscaling = stages.run(kernels, "up_grad")
    outputs = {"dlora_b": torch.empty_like(dlora_b), "dscaling": torch.empty_like(dscaling)}
    found = torch.empty_like(t)
    workspace = kernels.workspace("lora_up_grad", 20, 30, 5)
    arguments = {
        **{name: output if name in wanted else None for name, output in outputs.items()},
        "xa": stages.xa if wanted else None,
        "scaling": stages.scaling if wanted else None,
    }
    kernels.call(
        "lora_up_grad",
        t=found,
        workspace=workspace,
        grad=stages.wide,
        lora_b=stages.b,
        workspace_floats=workspace.numel(),
        n=30,
        grad_stride_m=30,
        **arguments,
        **stages.shared(),
    )
    assert_exact(found, t, "t")
    for name, expected in (("dlora_b", dlora_b), ("dscaling", dscaling)):
        if name in wanted:
            assert_exact(outputs[name], expected, name)


def test_errors_name_the_kernel(kernels: Kernels) -> None:
    stages = Stages(4, 8, 2, precision=PRECISIONS[1])
    stages.precision = Precision(torch.float32, torch.bfloat16)
    with pytest.raises(RuntimeError, match="lora_down: no kernel for dtype 0 beside adapter"):
        stages.run(kernels, "down")


def test_a_workspace_that_is_too_small_is_refused(kernels: Kernels) -> None:
    stages = Stages(4, 8, 2)
    small = torch.empty(3)
    kernels_workspace, kernels.workspace = kernels.workspace, lambda *_: small
    try:
        with pytest.raises(
            RuntimeError, match="lora_down_grad: a workspace of 3 floats, 16 needed"
        ):
            stages.run(kernels, "down_grad")
    finally:
        kernels.workspace = kernels_workspace


def test_an_access_out_of_bounds_is_found(fresh_kernels: Kernels) -> None:
    """AddressSanitizer would see a kernel read past its input."""
    stages = Stages(6, 16, 2)
    stages.wide = stages.wide[:5].clone()
    with pytest.raises(ChildProcessError, match="heap-buffer-overflow"):
        stages.run(fresh_kernels, "down")


# Two tiles of whatever a kernel loops over; for the gradients that takes more rows than there are
# blocks. A barrier after the last tile guards nothing.
TWO_TILES = {"m": 32, "columns": 256, "r": 17, "p": 0.1}
TWO_TILES_OF_ROWS = {"m": 4112, "columns": 8, "r": 1, "p": 0.1}
RACE_SHAPES = {
    stage: TWO_TILES_OF_ROWS if stage in ("up_grad", "down_grad") else TWO_TILES for stage in STAGES
}
BARRIERS = {
    "down": (1, 2, 3, 5),
    "up": (1, 2, 3),
    "up_grad": (1, 2, 3, 4),
    "down_grad": (1, 2, 3),
    "dx": (1, 2, 3),
}


@pytest.mark.parametrize("stage", STAGES)
def test_no_races(racing: Callable[[int], Kernels], stage: str) -> None:
    Stages(**RACE_SHAPES[stage]).check(racing(0), stage)


CASES = [(stage, barrier) for stage in STAGES for barrier in BARRIERS[stage]]
FIRST = [("down", 1), ("up_grad", 2)]


@pytest.mark.parametrize(
    ("stage", "barrier"),
    [pytest.param(*c, marks=() if c in FIRST else pytest.mark.more) for c in CASES],
)
def test_a_removed_barrier_is_a_race(
    racing: Callable[[int], Kernels], stage: str, barrier: int
) -> None:
    with pytest.raises(ChildProcessError, match="ThreadSanitizer: data race"):
        Stages(**RACE_SHAPES[stage]).run(racing(barrier), stage)
