"""The user's own task: a pretrained encoder of transformers' learns to classify labelled text."""

from __future__ import annotations

import copy
import csv
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfastft._cli import UsageError

MAX_TOKENS = 128
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Examples:
    """Sentences and their labels; ``names[label]`` is the label as the file writes it."""

    sentences: list[str]
    labels: list[int]
    names: list[str]
    source: str


def read_examples(path: Path) -> Examples:
    """Read labelled text: a CSV or TSV table, or lines ``label sentence``.

    Raises:
        UsageError: the file is missing, empty, malformed, or cannot be learned from; names the line
            where there is one.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data {path}: {error.strerror}") from None
    if b"\0" in raw:
        raise UsageError(f"--data {path}: expected text, got binary data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    table = TABLES.get(path.suffix.lower())
    pairs = _from_table(path, text, table) if table else _from_lines(path, text)
    if not pairs:
        raise UsageError(f"--data {path}: expected labelled sentences, got an empty file")
    counts = Counter(label for label, _ in pairs)
    if len(counts) == 1:
        raise UsageError(
            f"--data {path}: expected two labels or more, got only {pairs[0][0]!r} "
            f"in {len(pairs)} examples"
        )
    if 4 * len(counts) > len(pairs):
        raise UsageError(
            f"--data {path}: expected lines 'label sentence', "
            f"got {len(counts)} different labels in {len(pairs)} examples"
        )
    for name, count in counts.items():
        if count < 2:
            raise UsageError(
                f"--data {path}: expected two examples or more of each label, "
                f"got one of {name!r}: one has to be held out"
            )
    names = sorted(counts)
    number = {name: i for i, name in enumerate(names)}
    return Examples(
        sentences=[sentence for _, sentence in pairs],
        labels=[number[label] for label, _ in pairs],
        names=names,
        source=path.name,
    )


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        label, _, sentence = line.strip().partition(" ")
        if not sentence.strip():
            raise UsageError(
                f"--data {path}, line {number}: expected 'label sentence', got {line.strip()!r:.60}"
            )
        pairs.append((label, sentence.strip()))
    return pairs


def _from_table(path: Path, text: str, delimiter: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    pairs = []
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        if not columns:
            return []
        for wanted in ("text", "label"):
            if wanted not in columns:
                raise UsageError(
                    f"--data {path}: expected the columns text and label, got {', '.join(columns)}"
                )
        reader.fieldnames = columns
        for row in reader:
            label, sentence = (row[name] for name in ("label", "text"))
            if None in row or not label or not sentence or not sentence.strip():
                raise UsageError(
                    f"--data {path}, line {reader.line_num}: "
                    f"expected {len(columns)} fields with a text and a label"
                )
            pairs.append((label.strip(), sentence.strip()))
    except csv.Error as error:
        raise UsageError(f"--data {path}, line {reader.line_num}: {error}") from None
    return pairs


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: Any, *, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def lora_targets(self) -> list[str]:
        """The encoder's linear layers, but a pooler's, whose output is not used."""
        return [
            f"encoder.{name}"
            for name, module in self.encoder.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith("pooler")
        ]

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token ids and mask (B, T) to logits (B, classes)."""
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class Text:
    """Classify the user's sentences; a stratified share of them is held out."""

    name = "text"

    def __init__(
        self, folder: Path, examples: Examples, *, seed: int, quick: bool, device: torch.device
    ) -> None:
        if not (folder / "config.json").is_file():
            raise UsageError(f"--model {folder}: expected a folder with a config.json")
        self.folder = folder
        self.examples = examples
        self.seed = seed
        self.device = device
        self.runs = 1
        self.learning_rates = {"full": 1e-4, "adapter": 2e-3}
        self.batch = 16
        self.steps = 12 if quick else 40
        limit = 100 if quick else 400
        self.training, self.testing = self._split(limit)

    @property
    def title(self) -> str:
        return f"{self.folder.resolve().name} on {self.examples.source}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the figures."""
        return {
            "model": self.folder.resolve().name,
            "data": self.examples.source,
            "labels": len(self.examples.names),
            "training examples": len(self.training),
            "test examples": len(self.testing),
            "steps": self.steps,
            "examples a step": self.batch,
            "share of the largest class in the test": self._largest_class(),
        }

    def prepare(self) -> None:
        """Load the model and its tokenizer from the folder; nothing is downloaded."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(self.seed)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            encoder = AutoModel.from_pretrained(
                self.folder, local_files_only=True, dtype=torch.float32
            )
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            model = Classifier(encoder, classes=len(self.examples.names)).to(self.device)
            model(self._inputs(self.testing[:1])[0])
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"--model {self.folder}: cannot be used as a text encoder: {reason}"
            ) from error
        if not model.lora_targets:
            raise UsageError(f"--model {self.folder}: the model has no nn.Linear to adapt")
        self.pretrained = model

    def model(self) -> Classifier:
        """A fresh copy of the pretrained encoder with its untrained head."""
        return copy.deepcopy(self.pretrained)

    def batches(self, run: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The training batches of one run."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * (run + 1))
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < self.batch:
                shuffled = torch.randperm(len(self.training), generator=generator).tolist()
                order += [self.training[i] for i in shuffled]
            chosen, order = order[: self.batch], order[self.batch :]
            yield self._inputs(chosen)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the held-out sentences that the model gets right."""
        model.eval()
        # Sentences of like length together: less padding.
        order = sorted(self.testing, key=lambda i: len(self.examples.sentences[i]))
        right = 0
        for start in range(0, len(order), 4 * self.batch):
            inputs, labels = self._inputs(order[start : start + 4 * self.batch])
            right += int((model(inputs).argmax(1) == labels).sum())
        return right / len(order)

    def _inputs(self, chosen: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tokens = self.tokenizer(
            [self.examples.sentences[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        labels = torch.tensor([self.examples.labels[i] for i in chosen], device=self.device)
        return {name: value.to(self.device) for name, value in tokens.items()}, labels

    def _split(self, limit: int) -> tuple[list[int], list[int]]:
        """A third of each label is held out, at most ``limit`` sentences in all."""
        generator = torch.Generator().manual_seed(self.seed)
        training: list[int] = []
        testing: list[int] = []
        for label in range(len(self.examples.names)):
            of_label = [i for i, found in enumerate(self.examples.labels) if found == label]
            order = torch.randperm(len(of_label), generator=generator).tolist()
            share = min(1 / 3, limit / len(self.examples.labels))
            held = max(1, int(len(of_label) * share))
            testing += [of_label[i] for i in order[:held]]
            training += [of_label[i] for i in order[held:]]
        return training, testing

    def _largest_class(self) -> float:
        counts = Counter(self.examples.labels[i] for i in self.testing)
        return max(counts.values()) / len(self.testing)
