"""What the CPU library does to the process it is loaded into: threads, forks, floating-point state,
and what it takes from the environment. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyfastft as ft
from pyfastft import _native
from pyfastft.testing.tolerance import assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")
)

PRELUDE = """
import os, sys, torch
import pyfastft as ft

def tensors(m=256, n=320, k=192, r=4):
    torch.manual_seed(0)
    return torch.randn(m, k), torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)

def call(operands):
    with ft.backend("cpu"):
        return ft.lora_linear(*operands, p=0.1, rng=torch.tensor([3, 4]))

def tasks():
    return len(os.listdir("/proc/self/task"))
"""
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc is absent")


def process(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; fails where it fails or hangs."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@needs_proc
def test_one_openmp_runtime() -> None:
    """Two would have two pools of threads, and know nothing of torch.set_num_threads."""
    printed = process("""
        call(tensors())
        paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        print(*sorted(p for p in paths if any(s in p for s in ("gomp", "libomp", "iomp"))))
        """)
    assert len(printed.split()) == 1, printed


@needs_proc
def test_threads_are_those_of_torch() -> None:
    """One thread starts no other; three start two more."""
    printed = process("""
        torch.set_num_threads(1)
        operands = tensors(m=1024)
        before = tasks()
        call(operands)
        alone = tasks()
        torch.set_num_threads(3)
        call(operands)
        print(alone - before, tasks() - alone)
        """)
    assert printed == "0 2"


@needs_proc
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes() -> None:
    """After a parallel region in the parent, whose pool of threads the child does not have."""
    printed = process("""
        import signal
        operands = tensors(m=1024)
        torch.set_num_threads(3)
        before = tasks()
        expected = call(operands).numpy().tobytes()
        assert tasks() > before, "no parallel region ran before the fork"
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # kills a child that waits for threads that do not exist
            same = call(operands).numpy().tobytes() == expected
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        assert call(operands).numpy().tobytes() == expected
        print(status)
        """)
    assert printed == "0"


def test_denormals_stay_alive() -> None:
    """A library linked with -ffast-math would turn them off for the whole process."""
    printed = process("""
        y = call(tensors())
        tiny = torch.tensor([1e-40])
        out = ft.lora_linear(tiny, torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        print(1e-310 / 2, out.item() == tiny.item() != 0)
        """)
    assert printed == "5e-311 True"


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.isa())
"""


@pytest.mark.parametrize(
    "level", range(len(_native.ISA_LEVELS)), ids=lambda i: _native.ISA_LEVELS[i]
)
def test_the_environment_caps_the_instruction_set(level: int) -> None:
    detected = _native.cpu().isa()[0]
    command = [sys.executable, "-c", LOAD, _native.cpu().__file__]
    environment = {**os.environ, "PYFASTFT_CPU_ISA": _native.ISA_LEVELS[level]}
    printed = subprocess.check_output(command, text=True, env=environment, timeout=60)
    assert printed.split() == [str(detected), str(min(level, detected))]


def test_an_unknown_instruction_set_is_refused() -> None:
    printed = process(
        """
        try:
            call(tensors())
        except ValueError as error:
            print(error)
        """,
        PYFASTFT_CPU_ISA="avx3",
    )
    expected = ", ".join(_native.ISA_LEVELS)
    assert printed == f"PYFASTFT_CPU_ISA: expected one of {expected}, got 'avx3'"


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_concurrent_calls_give_equal_bits(torch_threads: int, threads: None) -> None:
    torch.set_num_threads(torch_threads)
    rng = torch.tensor([5, 6])
    operands = [torch.randn(33, 70), torch.randn(50, 70), torch.randn(3, 70), torch.randn(50, 3)]

    def step(_: int) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in operands]
        y = ft.lora_linear(*leaves, p=0.3, rng=rng)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with ft.backend("cpu"):
        expected = step(0)
        with ThreadPoolExecutor(8) as pool:
            for results in pool.map(step, range(200)):
                for actual, wanted in zip(results, expected, strict=True):
                    assert_exact(actual, wanted)
