"""Every op of the registry on every backend that can run here, against the float64 reference.

Nothing in this file names an op: a new one is tested as soon as it has samples.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from pyfastft import backend
from pyfastft._op import BACKENDS, ORDER, REGISTRY, Impl, Op
from pyfastft.testing.samples import (
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    Precision,
    Reject,
    Sample,
    flat,
    outputs_of,
    rejects,
    samples,
    upcast,
)
from pyfastft.testing.tolerance import assert_accurate, assert_exact

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
GPU = torch.cuda.is_available()
MIXED = Precision(torch.float16, torch.float32)

ALL_SAMPLES = [sample for op in REGISTRY for sample in samples(op)]
SMALL_SAMPLES = [sample for sample in ALL_SAMPLES if not sample.large]
DIFFERENTIABLE = [op for op in REGISTRY.values() if op.derivative is not None]


def device_of(name: str) -> torch.device:
    return CUDA if GPU and name in ORDER["cuda"] else CPU


def run(op: Op, name: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    with backend(name):
        return outputs_of(op, args)


def mapped(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The function of every tensor among the arguments and in lists of them."""

    def one(arg: Any) -> Any:
        return function(arg) if isinstance(arg, torch.Tensor) else arg

    return tuple([one(a) for a in arg] if isinstance(arg, list) else one(arg) for arg in args)


def why_not(op: Op, name: str, args: tuple[Any, ...]) -> str | None:
    impl = op.impl(name)
    return impl if isinstance(impl, str) else impl.unsupported(*args)


def skip_unless_at_hand(op: Op, name: str) -> None:
    if isinstance(impl := op.impl(name), str):
        pytest.skip(impl)


def skip_unless_supported(op: Op, name: str, args: tuple[Any, ...]) -> None:
    if (why := why_not(op, name, args)) is not None:
        pytest.skip(why)


def run_cases() -> list[Any]:
    """By sample, so that its truth is computed once for all backends."""
    return [
        pytest.param(
            *(name, precision, sample),
            id=f"{sample.op}-{name}-{precision}-{sample}",
            # The interpreter is slow, and to it this is bfloat16 beside float32.
            marks=[pytest.mark.slow] if name == "triton" and precision == MIXED and not GPU else [],
        )
        for sample in ALL_SAMPLES
        for precision in PRECISIONS
        for name in BACKENDS
        if GPU or name != "triton" or not sample.large
    ]


@functools.lru_cache(maxsize=4)
def truth_of(
    sample: Sample, precision: Precision, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """What the reference gives in float64, and in the sample's own precision."""
    op, args = REGISTRY[sample.op], sample.build(precision, device)
    return run(op, "reference", upcast(args)), run(op, "reference", args)


@pytest.mark.parametrize(("name", "precision", "sample"), run_cases())
def test_truth(name: str, precision: Precision, sample: Sample) -> None:
    op = REGISTRY[sample.op]
    skip_unless_at_hand(op, name)
    args = sample.build(precision, device_of(name))
    skip_unless_supported(op, name, args)
    actual = run(op, name, args)
    truth, naive = truth_of(sample, precision, device_of(name))
    gradient = sample.op.endswith("_backward")
    for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
        assert a.is_contiguous()
        if t.is_floating_point():
            assert_accurate(a, t, n, gradient=gradient, what=f"output {i} of {sample}")
        elif not torch.equal(a, t):
            # A choice among numbers that round to the same is the naive one's, not the truth's.
            assert_exact(a, n, f"output {i} of {sample}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sample", SMALL_SAMPLES, ids=lambda s: f"{s.op}-{s}")
def test_inputs_are_left_alone(name: str, sample: Sample) -> None:
    op = REGISTRY[sample.op]
    if op.mutates:
        pytest.skip("mutates by design")
    skip_unless_at_hand(op, name)
    args = sample.build(FLOAT32, device_of(name))
    skip_unless_supported(op, name, args)
    before = copy.deepcopy(_tensors(args))
    versions = [a._version for a in _tensors(args)]
    run(op, name, args)
    after = _tensors(args)
    assert [a._version for a in after] == versions
    for old, new in zip(before, after, strict=True):
        assert_exact(new, old, "an input")


def first_at_hand(op: Op, args: tuple[Any, ...]) -> str:
    """A backend for what is the same on all: how an op is registered, traced and compiled."""
    return "cpu" if why_not(op, "cpu", args) is None else "reference"


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("sample", SMALL_SAMPLES, ids=lambda s: f"{s.op}-{s}")
def test_opcheck(name: str, sample: Sample) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it")
    op = REGISTRY[sample.op]
    args = sample.build(FLOAT32, CPU)
    skip_unless_supported(op, name, args)
    checks = ["test_schema", "test_faketensor"]
    if name == first_at_hand(op, args):
        checks.append("test_autograd_registration")
        if not is_differentiable(sample):
            # Of the others test_compiles_whole_with_dynamic_shapes checks it, and the bits too.
            checks.append("test_aot_dispatch_dynamic")
    if op.derivative is not None:
        args = mapped(lambda a: a.requires_grad_() if a.is_floating_point() else a, args)
    with backend(name):
        torch.library.opcheck(op.overload, args, test_utils=checks)


def is_differentiable(sample: Sample) -> bool:
    args = _tensors(sample.build(FLOAT32, CPU))
    return REGISTRY[sample.op].derivative is not None and all(a.numel() for a in args)


def differentiable_samples() -> list[Sample]:
    return [sample for sample in SMALL_SAMPLES if is_differentiable(sample)]


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [a for a in flat(args) if isinstance(a, torch.Tensor)]


def leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as leaves that require a gradient, where they can have one."""
    return mapped(
        lambda a: (
            a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            if a.is_floating_point()
            else a
        ),
        args,
    )


def first(outputs: Any) -> tuple[torch.Tensor, ...]:
    """What an op computes; what comes after it is kept for the backward."""
    return flat(outputs[0] if isinstance(outputs, tuple) else outputs)


def gradients(call: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Of a weighted sum of the output, with the output's signs: where a gradient is one number,
    its terms should not cancel, or its naive error would be a matter of luck."""
    outputs = first(call(*args))
    weights = []
    for output in outputs:
        weight = torch.linspace(0.5, 1, output.numel(), dtype=torch.float64).view(output.shape)
        weights.append((weight.to(output.device) * output.detach().sign()).to(output.dtype))
    wanted = [a for a in _tensors(args) if a.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, weights))


def tiny_samples() -> list[Sample]:
    """Those that finite differences get through quickly: one step per element."""
    several = differentiable_samples()
    return [s for s in several if sum(a.numel() for a in _tensors(s.build(FLOAT32, CPU))) < 400]


@pytest.mark.parametrize("sample", tiny_samples(), ids=str)
def test_gradcheck(sample: Sample) -> None:
    """Of the operator; the op itself gives the same bits (test_gradients_through_autograd)."""
    op = REGISTRY[sample.op]
    args = leaves(sample.build(FLOAT64, CPU))
    inputs = [a for a in _tensors(args) if a.requires_grad]

    def output(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        replaced = iter(values)
        replaced_args = mapped(lambda a: next(replaced) if a.requires_grad else a, args)
        return first(op.overload(*replaced_args))

    with backend("reference"):
        assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sample", differentiable_samples(), ids=str)
def test_gradients_through_autograd(name: str, sample: Sample) -> None:
    """Autograd's gradients of a backend, by the eager short way and through the dispatcher."""
    op = REGISTRY[sample.op]
    skip_unless_at_hand(op, name)
    args = leaves(sample.build(FLOAT32, device_of(name)))
    skip_unless_supported(op, name, args)
    with backend("reference"):
        truth = gradients(op, leaves(upcast(args)))
        naive = gradients(op, args)
    with backend(name):
        short, long = gradients(op, args), gradients(op.overload, args)
    for s, g, t, n in zip(short, long, truth, naive, strict=True):
        assert_exact(s, g, "the short way's gradient")
        assert_accurate(s, t, n, gradient=True, what="gradient")


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_the_public_function_gives_the_same_gradients(op: Op) -> None:
    import pyfastft.autograd as functions

    if op.lists:
        pytest.skip("a Function does not see tensors in lists")
    function = next(f for f in map(functions.__dict__.get, functions.__all__) if f is op.derivative)
    args = leaves(next(samples(op.name)).build(FLOAT32, CPU))
    for one, other in zip(gradients(function.apply, args), gradients(op, args), strict=True):
        assert_exact(one, other, "a gradient")


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_only_the_gradients_asked_for(op: Op) -> None:
    sample = next(samples(op.name))
    args = sample.build(FLOAT32, CPU)
    whole = gradients(op, leaves(args))
    for wanted in range(1, 2 ** len(whole)):
        bits = iter(range(len(whole)))
        some = mapped(
            lambda a, wanted=wanted, bits=bits: (
                a.detach().clone().requires_grad_(bool(wanted >> next(bits) & 1))
                if a.is_floating_point()
                else a
            ),
            args,
        )
        asked = [gradient for bit, gradient in enumerate(whole) if wanted >> bit & 1]
        for gradient, expected in zip(gradients(op, some), asked, strict=True):
            assert_exact(gradient, expected, f"a gradient of subset {wanted:b}")


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
@pytest.mark.parametrize("way", ["op", "operator"])
def test_double_backward_raises(op: Op, way: str) -> None:
    args = leaves(next(samples(op.name)).build(FLOAT32, CPU))
    call = op if way == "op" else op.overload
    inputs = [a for a in _tensors(args) if a.requires_grad]
    total = sum(output.square().sum() for output in first(call(*args)))
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.grad(sum(g.sum() for g in grads), inputs)


@pytest.mark.parametrize("sample", differentiable_samples(), ids=str)
def test_compiles_whole_with_dynamic_shapes(sample: Sample) -> None:
    """One graph, and the same bits as eager mode, forward and backward."""
    op = REGISTRY[sample.op]
    args = leaves(sample.build(FLOAT32, CPU))

    def step(*args: Any) -> tuple[list[torch.Tensor]]:
        return ([output.relu() * 2 for output in first(op(*args))],)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with backend(first_at_hand(op, args)):
        expected, actual = gradients(step, args), gradients(compiled, args)
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e, f"compiled {sample}")


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_autocast_casts_what_the_op_names(op: Op) -> None:
    if op.mutates:
        pytest.skip("writes into its arguments as they are")
    args = next(samples(op.name)).build(FLOAT32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output = next((o for o in flat(op(*args)) if o.is_floating_point()), None)
    if output is None:
        pytest.skip("gives integers")
    casts = "AutocastCPU" in torch._C._dispatch_dump(f"pyfastft::{op.name}")
    assert output.dtype == (torch.bfloat16 if casts else torch.float32)


REJECTS = [reject for op in REGISTRY for reject in rejects(op)]


@pytest.mark.parametrize("way", ["op", "contract"])
@pytest.mark.parametrize("reject", REJECTS, ids=lambda r: f"{r.op}-{r.name}")
def test_rejects(reject: Reject, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names op, argument, expected and got; no backend is entered."""
    op = REGISTRY[reject.op]

    def entered(*args: Any) -> None:
        raise AssertionError("a backend was entered")

    for name in BACKENDS:
        monkeypatch.setitem(op.impls, name, Impl(entered, lambda *args: None))
    call = op if way == "op" else op.contract
    with pytest.raises(reject.error) as caught:
        call(*reject.args)
    message = str(caught.value)
    assert message.startswith(f"{op.name}: expected {reject.argument} of "), message
    assert reject.expected in message, message
    assert f"got {reject.got}" in message or reject.got in message.split("got ")[1], message


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_no_backend_names_every_reason(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    args = next(samples(op.name)).build(FLOAT32, CPU)
    for name in BACKENDS:
        monkeypatch.setitem(op.impls, name, Impl(lambda *a: None, lambda *a, n=name: f"no {n}"))
    with pytest.raises(NotImplementedError) as caught:
        op(*args)
    assert str(caught.value).startswith(f"{op.name}: no backend supports (")
    for name in ORDER["cpu"]:
        assert f"{name}: no {name}" in str(caught.value)
    explanation = op.explain(*args)
    assert explanation.chosen is None
    assert list(explanation.reasons) == list(ORDER["cpu"])
