"""The op mechanism: when the eager short way is left, how a backend is chosen, what is said."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import pyfastft as ft
from pyfastft import _op
from pyfastft._op import BACKENDS, ORDER, REGISTRY, Impl
from pyfastft.testing.samples import FLOAT32, samples

CPU = torch.device("cpu")
LORA = REGISTRY["lora_linear"]


def arguments() -> tuple[Any, ...]:
    return next(samples("lora_linear")).build(FLOAT32, CPU)


class Logged(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@contextlib.contextmanager
def forward_mode():
    with forward_ad.dual_level():
        yield


@contextlib.contextmanager
def functorch_level():
    torch._C._functorch._grad_increment_nesting()
    try:
        yield
    finally:
        torch._C._functorch._grad_decrement_nesting()


WRAPPERS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Logged,
    "function mode": lambda: torch.device("cpu"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "forward-mode derivative": forward_mode,
    "functorch level": functorch_level,
}


def test_plain_arguments_take_the_short_way() -> None:
    assert _op._is_plain(arguments())
    with torch.inference_mode():
        assert _op._is_plain(arguments())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_whatever_could_intercept_takes_the_long_way(wrapper: str) -> None:
    args = arguments()
    with WRAPPERS[wrapper]():
        assert not _op._is_plain(args)
    assert _op._is_plain(args)


UNUSUAL = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "negative view": torch._neg_view,
    "negative parameter": lambda t: torch.nn.Parameter(torch._neg_view(t)),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "functional": torch._to_functional_tensor,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_tensor_takes_the_long_way(kind: str) -> None:
    x, weight, *rest = arguments()
    assert not _op._is_plain((x, UNUSUAL[kind](weight), *rest))


def test_a_negative_view_computes_what_it_shows() -> None:
    x, *rest = arguments()
    torch.testing.assert_close(LORA(torch._neg_view(-x), *rest)[0], LORA(x, *rest)[0])


def test_a_trace_takes_the_long_way() -> None:
    seen = []

    def call(x):
        seen.append(_op._is_plain((x,)))
        return x + 1

    torch.jit.trace(call, torch.zeros(2), check_trace=False)
    assert seen == [False]


def test_a_dispatch_mode_sees_the_operator() -> None:
    with Logged() as mode:
        LORA(*arguments())
    assert "pyfastft.lora_linear.default" in mode.seen


def test_make_fx_records_one_node() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    args = arguments()
    graph = make_fx(lambda x: LORA(x, *args[1:])[0])(args[0])
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("pyfastft.lora_linear.default") == 1


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    args = tuple(a.requires_grad_() if _is_float(a) else a for a in arguments())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, xa = LORA(*args)
    assert xa.shape in packed
    assert args[0].shape in packed
    y.sum().backward()
    assert args[0].grad is not None


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def test_backend_is_forced_and_restored() -> None:
    args = arguments()
    before = LORA.explain(*args).chosen
    with ft.backend("reference"):
        assert LORA.explain(*args).chosen == "reference"
        with ft.backend("auto"):
            assert LORA.explain(*args).chosen == before
    assert LORA.explain(*args).chosen == before


def test_backend_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of cpu, cuda, triton, reference"):
        ft.backend("gpu").__enter__()


def test_a_forced_backend_does_not_fall_back() -> None:
    args = arguments()
    doubles = tuple(a.double() if _is_float(a) else a for a in args)
    with ft.backend("cpu"), pytest.raises(NotImplementedError, match=r"cpu: .*float64"):
        LORA(*doubles)


def test_the_backward_runs_on_the_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing is process-wide: autograd may run the backward in a thread of its own."""
    ran = []
    backward = REGISTRY["lora_linear_backward"]
    launch = backward.impl("reference").launch
    spy = Impl(lambda *a: (ran.append("reference"), launch(*a)), lambda *a: None)
    monkeypatch.setitem(backward.impls, "reference", spy)
    args = tuple(a.requires_grad_() if _is_float(a) else a for a in arguments())
    with ft.backend("reference"):
        LORA(*args)[0].sum().backward()
    assert ran == ["reference"]


def test_explain_takes_names_functions_and_keywords() -> None:
    x, weight, lora_a, lora_b, *_ = arguments()
    for op in ("lora_linear", ft.lora_linear, LORA):
        explanation = ft.explain(op, x, weight, lora_a, lora_b, scaling=2.0)
        assert explanation.chosen in ORDER["cpu"]
        assert str(explanation).startswith("lora_linear on cpu: ")
    doubles = [t.double() for t in (x, weight, lora_a, lora_b)]
    explanation = ft.explain("lora_linear", *doubles)
    assert explanation.chosen == "reference"
    assert "float64" in explanation.reasons["cpu"]
    with pytest.raises(KeyError, match="expected an op of"):
        ft.explain("no_such_op", x)


def test_a_fallback_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setitem(LORA.impls, "cpu", Impl(lambda *a: None, lambda *a: "out of order"))
    monkeypatch.setattr(_op, "_fallbacks_told", set())
    with caplog.at_level(logging.WARNING, "pyfastft"):
        LORA(*arguments())
        LORA(*arguments())
    assert len(caplog.records) == 1
    assert "cpu: out of order" in caplog.text


def test_strict_turns_a_fallback_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LORA.impls, "cpu", Impl(lambda *a: None, lambda *a: "out of order"))
    monkeypatch.setenv("PYFASTFT_STRICT", "1")
    with pytest.raises(NotImplementedError, match=r"cpu: out of order\n.*PYFASTFT_STRICT"):
        LORA(*arguments())
    with ft.backend("reference"):
        LORA(*arguments())


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("auto", 0), ("fastest", 1)])
def test_the_environment_forces_a_backend(value: str, code: int) -> None:
    script = "from pyfastft import _op; print(_op._forced)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYFASTFT_BACKEND": value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    if code:
        assert f"expected one of {', '.join(BACKENDS)} or auto, got 'fastest'" in done.stderr
    else:
        assert done.stdout.strip() == ("None" if value == "auto" else value)


def test_mutating_ops_go_through_the_dispatcher() -> None:
    """The dispatcher counts versions; the short way does not."""
    calls = []
    op = _op.Op(
        "bump_", "lora", lambda x: None, ("x",), mutates=True, lists=False, overload=calls.append
    )
    op(torch.zeros(1))
    assert len(calls) == 1
