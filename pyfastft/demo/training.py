"""Fine-tune with all methods in step, so that their times are comparable on a shared machine."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pyfastft.demo.methods import METHODS, Method

WARM_UP_STEPS = 3  # not timed


class Task(Protocol):
    """A pretrained model, and data of a new domain."""

    name: str
    device: torch.device
    learning_rates: dict[str, float]
    seed: int
    runs: int
    steps: int

    @property
    def title(self) -> str:
        """What is fine-tuned to what, in a few words."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the figures."""

    def prepare(self) -> None:
        """Load or pretrain the model."""

    def model(self) -> Any:
        """A fresh copy of the pretrained model, with ``head`` and ``lora_targets``."""

    def batches(self, run: int) -> Iterator[tuple[Any, torch.Tensor]]:
        """The run's training batches, inputs and labels."""

    def accuracy(self, model: nn.Module) -> float:
        """On held-out data of the new domain."""


@dataclass
class Result:
    """What one method came to, over all runs."""

    method: Method
    accuracy_before: list[float] = field(default_factory=list)
    accuracy_after: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parameters: int = 0
    trainable: int = 0
    optimizer_bytes: int = 0
    peak_bytes: int = 0

    @property
    def milliseconds(self) -> float:
        """Of one training step: forward, backward and update; the median."""
        return 1e3 * statistics.median(self.seconds)


class Trainee:
    """One model under one method. Its random state is its own, so rows don't affect each other."""

    def __init__(self, method: Method, task: Task, run: int) -> None:
        torch.manual_seed(task.seed + run)
        self.device = task.device
        self.model = task.model()
        method.apply(self.model)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=task.learning_rates[method.kind],
        )
        warm_up = max(1, task.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, (task.steps - step) / task.steps),
        )
        self.random_state = self._random_state()

    def step(self, inputs: Any, labels: torch.Tensor) -> tuple[float, float]:
        """Train on one batch; its loss and the seconds it took."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self._set_random_state(self.random_state)
            self.model.train()
            start = self._clock()
            loss = self.update(inputs, labels)
            seconds = self._clock() - start
            self.random_state = self._random_state()
        self.schedule.step()
        return float(loss), seconds

    def update(self, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Forward, backward, update: what is timed."""
        loss = F.cross_entropy(self.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(t.nbytes for t in states if isinstance(t, torch.Tensor))

    def peak_bytes(self, inputs: Any, labels: torch.Tensor) -> int:
        """Of one more step: weights and optimizer state, and what the step allocates on top."""
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        resident = sum(tensor.nbytes for tensor in weights) + self.optimizer_bytes
        return resident + _allocated(lambda: self.update(inputs, labels), self.device)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _random_state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None

    def _set_random_state(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)


def compare(task: Task, *, runs: int, methods: Sequence[Method] = METHODS) -> list[Result]:
    """Fine-tune with every method, step by step in turn, and measure."""
    task.prepare()
    results = [Result(method) for method in methods]
    progress = tqdm(total=runs * len(methods) * task.steps, desc="fine-tuning", unit="step")
    for run in range(runs):
        trainees = [Trainee(method, task, run) for method in methods]
        for result, trainee in zip(results, trainees, strict=True):
            result.accuracy_before.append(task.accuracy(trainee.model))
            result.losses.append([])
        for step, (inputs, labels) in enumerate(task.batches(run)):
            # Who comes first changes from step to step: none is always the one with cold caches.
            for i in range(len(methods)):
                i = (i + step) % len(methods)
                loss, seconds = trainees[i].step(inputs, labels)
                results[i].losses[-1].append(loss)
                if step >= WARM_UP_STEPS:
                    results[i].seconds.append(seconds)
                progress.update()
        for result, trainee in zip(results, trainees, strict=True):
            result.accuracy_after.append(task.accuracy(trainee.model))
            if run == runs - 1:
                _record_sizes(result, trainee, inputs, labels)
    progress.close()
    return results


def _record_sizes(result: Result, trainee: Trainee, inputs: Any, labels: torch.Tensor) -> None:
    parameters = list(trainee.model.parameters())
    result.parameters = sum(p.numel() for p in parameters)
    result.trainable = sum(p.numel() for p in parameters if p.requires_grad)
    result.optimizer_bytes = trainee.optimizer_bytes
    trainee.model.train()
    result.peak_bytes = trainee.peak_bytes(inputs, labels)


def _allocated(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held at once for what ``call`` allocated."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")
