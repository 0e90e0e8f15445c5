"""SaRA's training: a loss that keeps the trained part of low rank, and a second choice midway."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pyfastft._check import reject
from pyfastft.sparsity.model import sets_of
from pyfastft.sparsity.set import SparseSet

# Odd polynomials a x + b x^3 + c x^5, one after the other: what they make of [0.001, 1] is nearest
# to 1 of all such compositions; the last, with a fixed point of third order, settles the rest.
_SETTLE = (15 / 8, -10 / 8, 3 / 8)
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    *(_SETTLE, _SETTLE, _SETTLE),
)


@torch.no_grad()
def polar_factor(matrix: torch.Tensor) -> torch.Tensor:
    r"""The polar factor of a matrix, by products alone.

    .. math:: A = U \Sigma V^T \mapsto U V^T

    It is the gradient of the nuclear norm :math:`\|A\|_* = \operatorname{tr} \Sigma`. Singular
    values below about 1e-3 of the largest count in part, and those of 0 not at all: a subgradient.

    Args:
        matrix: A of shape (N, K), float32 or float64.

    Returns:
        Of A's shape and dtype.

    Reference:
        Amsel et al. 2025, "The Polar Express: Optimal Matrix Sign Methods and Their Application to
        the Muon Algorithm", arXiv:2505.16932, theorem 3.1: Newton and Schulz's iteration with the
        best polynomial at every step.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    # Two bounds of the largest singular value; zero only of a zero matrix, which stays.
    rows, columns = x.abs().sum(1).max(), x.abs().sum(0).max()
    bound = torch.minimum(x.norm(), (rows * columns).sqrt())
    x = x / bound.clamp(min=torch.finfo(x.dtype).tiny)
    with torch.autocast(x.device.type, enabled=False):
        for a, b, c in _POLYNOMIALS:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class SaRA:
    r"""What SaRA does beside training the small weights that ``convert`` chose.

    .. math::
        L = L_{task} + \lambda \| W_l \odot M_l \|_*, \quad
        \frac{\partial \| W_l \odot M_l \|_*}{\partial W_l} \Big|_{M_l} = (U V^T)|_{M_l}

    with one layer l drawn for every step, :math:`W_l \odot M_l = U \Sigma V^T`. The gradient
    reaches the trained values and nothing else. Halfway, the entries that have grown to the
    threshold t or above stop training, :math:`M \leftarrow M \cap \{|w| < t\}`, and the
    optimizer's state of the others begins anew::

        ft.convert(model, ft.MaskedTuning(method="sara", threshold=2e-3))
        optimizer = ft.optim.MaskedAdamW([p for p in model.parameters() if p.requires_grad])
        tuner = ft.sparsity.SaRA(model, optimizer, steps=len(batches))
        for batch in batches:
            (model(**batch).loss + tuner.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.step()

    In transformers' Trainer: ``Trainer(..., optimizers=(optimizer, schedule),
    callbacks=[tuner.callback()])``.

    Args:
        model: converted, not yet trained.
        optimizer: whose state of the sets is to begin anew.
        steps: how many steps training takes; the second choice comes after half of them.
        rank_weight: :math:`\lambda`.
        threshold: t; by default the least above the magnitude of every entry that trains now.
        least_side: layers with a side of at most this have no part in the loss.
        every_layer: the loss of all layers at every step, in place of one.
        seed: of the layers' order, the same on all ranks.

    Attributes:
        threshold: t.
        done: steps done.

    Raises:
        ValueError: nothing of the model trains in part, or not single entries; or no layer is
            large enough.

    Reference:
        Hu et al. 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse
        Low-Rank Adaptation", arXiv:2409.06633, sections 4.2 to 4.4.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        rank_weight: float = 5e-4,
        threshold: float | None = None,
        least_side: int = 64,
        every_layer: bool = False,
        seed: int = 0,
    ) -> None:
        self.sets = list(sets_of(model).values())
        if not self.sets or any(one.rows * one.columns != 1 for one in self.sets):
            layouts = sorted({one.layout for one in self.sets})
            reject("SaRA", "model", "weights of which single entries train", layouts)
        self.optimizer, self.steps, self.rank_weight = optimizer, steps, rank_weight
        self._large = [one for one in self.sets if min(one.shape) > least_side]
        if rank_weight and not self._large:
            shapes = sorted({one.shape for one in self.sets})
            reject("SaRA", "model", f"a layer with sides above {least_side}", shapes)
        self.threshold = _above(self.sets) if threshold is None else threshold
        self.every_layer = every_layer
        self.done = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def learning_rate(self) -> float:
        """The paper's rule: 1e-3 exp(-350 t), for AdamW and a cosine schedule."""
        return 1e-3 * math.exp(-350 * self.threshold)

    def loss(self) -> torch.Tensor:
        """:math:`\\lambda \\|W_l \\odot M_l\\|_*` of a layer drawn now, to be added to the task's.

        Beside the values it takes some dense matrices of that layer's size, for the call alone.
        """
        if not self.rank_weight:
            return self.sets[0].values.new_zeros(())
        drawn = self._large
        if not self.every_layer:
            number = torch.randint(len(drawn), (1,), generator=self._generator)
            drawn = [drawn[int(number)]]
        return self.rank_weight * torch.stack([_nuclear_norm(one) for one in drawn]).sum()

    def step(self) -> None:
        """Count a step of the optimizer, which has been taken; halfway, choose again."""
        self.done += 1
        if self.done == self.steps // 2:
            self.choose_again()

    @torch.no_grad()
    def choose_again(self) -> None:
        """Go on with the entries below the threshold; their gradients and state begin anew."""
        for one in self.sets:
            kept = one.values.abs() < self.threshold
            one.reindex(one.index[kept], one.values[kept])
            self.optimizer.state.pop(one.values, None)

    def callback(self) -> Any:
        """A callback for transformers' Trainer: the loss's gradient before each step of the
        optimizer, after any clipping, and :meth:`step` after it. Not for scaled losses."""
        from transformers import TrainerCallback

        tuner = self

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                if tuner.rank_weight:
                    tuner.loss().backward()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                tuner.step()

        return Callback()


def _nuclear_norm(one: SparseSet) -> torch.Tensor:
    """Of the weight with all but the trained entries zero; its gradient is the polar factor's."""
    n, k = one.shape
    offsets = one.offsets()
    dense = one.values.new_zeros(n * k)
    dense[offsets] = one.values.detach()
    # tr(P^T A) is the norm, and P is its gradient: to the values P is a constant.
    return torch.dot(polar_factor(dense.view(n, k)).reshape(-1)[offsets], one.values)


def _above(sets: list[SparseSet]) -> float:
    largest = max(float(one.values.detach().abs().max()) for one in sets if len(one))
    return math.nextafter(torch.tensor(largest).item(), math.inf)
