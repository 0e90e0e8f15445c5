"""4-bit layers in CUDA graphs: what is captured once gives at every replay what eager code does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft._native import why_no_cuda
from pyfastft.triton_kernels import _int4_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
STEPS = 3


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and why_no_cuda() is not None:
        pytest.skip(str(why_no_cuda()))
    with ft.backend(request.param):
        yield request.param


def quantized(p: float | None = None) -> nn.Module:
    """Two nf4 layers in bfloat16; with a probability, under adapters that drop as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128))
    ft.quantize(model, ft.PTQ4(codebook="nf4", group_size=64, targets=["0", "2"]))
    if p is not None:
        ft.convert(model, ft.LoRA(r=8, dropout=p, targets=["0", "2"], init="random"))
    return model.to("cuda", torch.bfloat16)


def captured(step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of one step, and where it leaves its output; :data:`STEPS` steps are run before it,
    which allocate, compile and tune what need not be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph, output


@pytest.mark.parametrize(
    ("engine", "rows"), [("panels", 300), ("gemv", 2), ("mma", 16), ("product", 300)]
)
def test_forward(backend: str, engine: str, rows: int) -> None:
    model = quantized()
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), _int4_engine.forced(engine):
        graph, y = captured(lambda: model(x))
        for _ in range(STEPS):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(y, model(x))


def training_step(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A step of SGD on the adapters; gradients keep their memory, as a graph wants it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("engine", ["panels", "product"])
def test_training_step(backend: str, engine: str) -> None:
    model = quantized(p=0.0)
    eager = copy.deepcopy(model)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    target = torch.randn(64, 128, device="cuda")
    with _int4_engine.forced(engine):
        graph, loss = captured(training_step(model, x, target))
        plain = training_step(eager, x, target)
        for _ in range(STEPS):
            plain()  # what came before the graph; capturing a step takes none
        for _ in range(STEPS):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(loss, plain())
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_every_replay_drops_others(backend: str) -> None:
    model = quantized(p=0.5)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    graph, y = captured(lambda: model(x))
    outputs = []
    for _ in range(STEPS):
        graph.replay()
        outputs.append(y.detach().clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert bool(torch.stack(outputs).isfinite().all())
