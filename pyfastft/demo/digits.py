"""The built-in task: a small vision transformer moves from handwritten digits to altered ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

PATCH = 4
SIDE = 8
CLASSES = 10
PRETRAINING_BATCH = 64


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*qkv.unbind(2))
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images of 8 x 8 pixels as 4 patches; the mean over the tokens is classified.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words".
    """

    def __init__(self, *, width: int = 256, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    @property
    def lora_targets(self) -> list[str]:
        """The layers that get an adapter: all linear ones but the head, which is trained itself."""
        return ["embed", "qkv", "proj", "fc1", "fc2"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 8, 8) to logits (B, 10)."""
        pixels = 4 * images - 2  # about centred, and as large as the position
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def shift(images: torch.Tensor) -> torch.Tensor:
    """The new domain: inverted and turned by a right angle."""
    return torch.rot90(1 - images, dims=(1, 2))


class Digits:
    """scikit-learn's 1,797 digits: pretraining on half of them, a few of those for the new domain.

    The other half is only ever tested on.
    """

    name = "digits"

    def __init__(self, *, seed: int, quick: bool, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        order = numpy.random.default_rng(seed).permutation(len(data.target))
        images = torch.tensor(data.images[order] / 16, dtype=torch.float32, device=device)
        labels = torch.tensor(data.target[order], device=device)
        half = len(labels) // 2
        self.train, self.test = (images[:half], labels[:half]), (images[half:], labels[half:])
        self.device = device
        self.seed = seed
        self.runs = 3
        self.batch = 128
        self.per_class = 16
        self.steps = 16 if quick else 60
        self.pretraining_steps = 60 if quick else 160
        self.learning_rates = {"full": 1e-3, "adapter": 6e-3}

    @property
    def title(self) -> str:
        return "vision transformer, digits to inverted and rotated digits"

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the figures."""
        return {
            "model": "vision transformer, 3 blocks of width 256, pretrained here",
            "data": "scikit-learn's handwritten digits",
            "training examples": f"{self.per_class} a class, other ones in each run",
            "test examples": len(self.test[1]),
            "steps": self.steps,
            "tokens a step": self.batch * (SIDE // PATCH) ** 2,
            "accuracy on the pretraining domain": self.source_accuracy,
        }

    def prepare(self) -> None:
        """Pretrain on the unaltered digits."""
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        model = VisionTransformer().to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-3, total_steps=self.pretraining_steps, pct_start=0.2
        )
        images, labels = self.train
        for _ in tqdm(range(self.pretraining_steps), desc="pretraining", unit="step"):
            chosen = torch.randint(len(labels), (PRETRAINING_BATCH,), generator=generator)
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        self.pretrained = model
        self.source_accuracy = self._accuracy(model, *self.test)

    def model(self) -> VisionTransformer:
        """A fresh copy of the pretrained model."""
        return copy.deepcopy(self.pretrained)

    def batches(self, run: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The training batches of one run, from that run's few examples."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * (run + 1))
        images, labels = self.train
        order = torch.randperm(len(labels), generator=generator)
        few = torch.cat([order[labels[order] == c][: self.per_class] for c in range(CLASSES)])
        for _ in range(self.steps):
            chosen = few[torch.randint(len(few), (self.batch,), generator=generator)]
            yield shift(images[chosen]), labels[chosen]

    def accuracy(self, model: nn.Module) -> float:
        """The share of the shifted test images that the model gets right."""
        images, labels = self.test
        return self._accuracy(model, shift(images), labels)

    def pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One test image per class, and the same in the new domain."""
        images, labels = self.test
        chosen = [int((labels == c).nonzero()[0]) for c in range(CLASSES)]
        return images[chosen].cpu(), shift(images[chosen]).cpu()

    @staticmethod
    @torch.no_grad()
    def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
        model.eval()
        return float((model(images).argmax(1) == labels).double().mean())
