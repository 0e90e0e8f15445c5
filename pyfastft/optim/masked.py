"""AdamW, SGD and Lion that step the trained parts of weights, all of them in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from pyfastft._check import reject
from pyfastft._random import draw_rng
from pyfastft.ops import masked as ops
from pyfastft.ops.masked._rectangles import matrix_of, wide
from pyfastft.sparsity.set import ATTRIBUTE, SparseSet


class _Masked(Optimizer):
    """What the optimizers share. Parameters are sets, their ``values``, or plain tensors that train
    whole; of a set only the trained entries and the weight's copies of them are written."""

    _op: Callable[..., None]
    _states: tuple[str, ...]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        params = [params] if isinstance(params, SparseSet) else params
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See :meth:`torch.optim.Optimizer.add_param_group`; sets count as their values."""
        given = param_group["params"]
        given = [given] if isinstance(given, (SparseSet, torch.Tensor)) else list(given)
        values = [one.values if isinstance(one, SparseSet) else one for one in given]
        super().add_param_group({**param_group, "params": values})

    def _hypers(self, group: dict[str, Any], step: float) -> tuple[float, ...]:
        raise NotImplementedError

    def _has_state(self, group: dict[str, Any]) -> bool:
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._start_state()
        by_device: dict[tuple[torch.device, bool], list[tuple[Any, ...]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    reject("step", "grad", "a dense layout", param.grad.layout, error=TypeError)
                kind = param.device, bool(group["stochastic_rounding"])
                by_device.setdefault(kind, []).append((param, group))
        for (device, stochastic), several in by_device.items():
            self._launch(several, draw_rng(device) if stochastic else None)
        return loss

    def _start_state(self) -> None:
        """State of parameters that get their first gradient, in one flat tensor for each name."""
        fresh = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and not self.state[param]
        ]
        for param, _ in fresh:
            self.state[param]["step"] = torch.tensor(0.0)
        kinds = {(param.device, wide(param.dtype)) for param, _ in fresh}
        for device, dtype in kinds:
            own = [
                param
                for param, group in fresh
                if (param.device, wide(param.dtype)) == (device, dtype) and self._has_state(group)
            ]
            lengths = [param.numel() for param in own]
            for name in self._states:
                arena = torch.zeros(sum(lengths), dtype=dtype, device=device)
                for param, part in zip(own, arena.split(lengths), strict=True):
                    self.state[param][name] = part

    def _launch(self, several: list[tuple[Any, ...]], rng: torch.Tensor | None) -> None:
        weights, values, grads, index, rows, columns, hypers = [], [], [], [], [], [], []
        states: tuple[list[torch.Tensor], ...] = tuple([] for _ in self._states)
        torch._foreach_add_([self.state[param]["step"] for param, _ in several], 1.0)
        for param, group in several:
            state, one = self.state[param], getattr(param, ATTRIBUTE, None)
            grad = param.grad
            if one is None:
                whole = param.detach() if param.dim() else param.detach().view(-1)
                n, k = matrix_of(whole)
                grad = grad.reshape(-1).to(wide(param.dtype))
                weights.append(whole)
                values.append(grad[:0])
                index.append(torch.zeros(1, dtype=torch.int64, device=param.device))
                rows.append(n)
                columns.append(k)
            else:
                weights.append(one.weight)
                values.append(param.detach())
                index.append(one.index)
                rows.append(one.rows)
                columns.append(one.columns)
            grads.append(grad)
            for name, own in zip(self._states, states, strict=True):
                own.append(state[name] if name in state else grad[:0])
            hypers.append(self._hypers(group, float(state["step"])))
        table = torch.tensor(hypers, dtype=torch.float64)
        type(self)._op(weights, values, *states, grads, index, rows, columns, table, rng)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`torch.optim.Optimizer.load_state_dict`. State keeps its dtype; torch's own
        method would make it the parameter's."""
        super().load_state_dict(state_dict)
        groups = zip(state_dict["param_groups"], self.param_groups, strict=True)
        for saved, group in groups:
            for number, param in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, torch.Tensor) and name != "step":
                        self.state[param][name] = value.detach().to(param.device, copy=True)


def _expect(name: str, value: float, least: float = 0.0, below: float = float("inf")) -> None:
    if not least <= value < below:
        end = "" if below == float("inf") else f" and below {below:g}"
        raise ValueError(f"optim: expected {name} of at least {least:g}{end}, got {value}")


class MaskedAdamW(_Masked):
    r"""AdamW of the trained entries :math:`w` alone.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        w \leftarrow (1 - \gamma\lambda) w -
        \frac{\gamma}{1-\beta_1^t} \frac{m}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    Args:
        params: sets (:class:`pyfastft.sparsity.SparseSet`), their ``values``, plain parameters that
            train whole, or dicts of them with options of their own.
        lr, betas, eps, weight_decay, maximize: as :class:`torch.optim.AdamW`. Only trained entries
            decay.
        stochastic_rounding: round weights of half precision stochastically, from torch's generator.

    Raises:
        ValueError: an option is out of range.

    Reference:
        Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    _op = ops.masked_adamw_
    _states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        _expect("lr", lr)
        _expect("betas[0]", betas[0], below=1.0)
        _expect("betas[1]", betas[1], below=1.0)
        _expect("eps", eps)
        _expect("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        switches = {"maximize": maximize, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**defaults, **switches})

    def _hypers(self, group: dict[str, Any], step: float) -> tuple[float, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (
            *(float(group["lr"]), group["weight_decay"], step, sign),
            *(*group["betas"], group["eps"]),
        )


class MaskedSGD(_Masked):
    r"""SGD with momentum of the trained entries :math:`w` alone.

    .. math::
        b \leftarrow \mu b + (1-\tau)(g + \lambda w), \quad w \leftarrow w - \gamma b

    Args:
        params: as :class:`MaskedAdamW`.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as :class:`torch.optim.SGD`.
        stochastic_rounding: as :class:`MaskedAdamW`.

    Raises:
        ValueError: an option is out of range, or Nesterov's momentum with none or with dampening.

    Reference:
        Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    _op = ops.masked_sgd_
    _states = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        _expect("lr", lr)
        _expect("momentum", momentum)
        _expect("weight_decay", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            got = f"momentum {momentum}, dampening {dampening}"
            raise ValueError(
                f"optim: expected momentum of above 0 undamped for nesterov, got {got}"
            )
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        switches = {"maximize": maximize, "stochastic_rounding": stochastic_rounding}
        more = {"weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, **more, **switches})

    def _has_state(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _hypers(self, group: dict[str, Any], step: float) -> tuple[float, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (
            *(float(group["lr"]), group["weight_decay"], step, sign),
            *(group["momentum"], group["dampening"], float(group["nesterov"])),
        )


class MaskedLion(_Masked):
    r"""Lion of the trained entries :math:`w` alone.

    .. math::
        w \leftarrow (1 - \gamma\lambda) w - \gamma \operatorname{sign}(\beta_1 m + (1-\beta_1) g),
        \quad m \leftarrow \beta_2 m + (1-\beta_2) g

    Args:
        params: as :class:`MaskedAdamW`.
        lr, betas, weight_decay: of the equation.
        maximize, stochastic_rounding: as :class:`MaskedAdamW`.

    Raises:
        ValueError: an option is out of range.

    Reference:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1.
    """

    _op = ops.masked_lion_
    _states = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        _expect("lr", lr)
        _expect("betas[0]", betas[0], below=1.0)
        _expect("betas[1]", betas[1], below=1.0)
        _expect("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        switches = {"maximize": maximize, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**defaults, **switches})

    def _hypers(self, group: dict[str, Any], step: float) -> tuple[float, ...]:
        sign = -1.0 if group["maximize"] else 1.0
        return (
            *(float(group["lr"]), group["weight_decay"], step, sign),
            *(*group["betas"], 0.0),
        )
