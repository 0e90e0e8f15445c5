"""The masked optimizer steps on gathered values, weight after weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import check_index, matrix_of, offsets_of
from pyfastft.reference._dropout import philox4x32

# update(value, gradient, hypers, *states) -> (new value, *new states)
_Update = Callable[..., tuple[torch.Tensor, ...]]


def draws(first: int, count: int, rng: torch.Tensor) -> torch.Tensor:
    """16 random bits for each value from number ``first`` on; int64."""
    position = first + torch.arange(count, device=rng.device)
    words = torch.stack(philox4x32(rng[0], position // 8, rng[1]), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return halves.gather(1, position[:, None] % 8)[:, 0]


def round_stochastic(
    values: torch.Tensor, dtype: torch.dtype, random: torch.Tensor
) -> torch.Tensor:
    """float32 values in a half-precision dtype, up with the probability of what is lost."""
    nearest, bits = values.to(dtype), values.view(torch.int32).long() & 0xFFFFFFFF
    if dtype is torch.bfloat16:
        rounded = _as_float(bits + random & 0xFFFF0000)
        return torch.where(values.isfinite(), rounded.to(dtype), nearest)
    magnitude = values.abs()
    normal = _as_float(bits + (random >> 3) & 0xFFFFE000)
    units = magnitude * 2.0**24
    whole = units.floor()
    up = (units - whole) * 65536 > random
    small = torch.copysign((whole + up) * 2.0**-24, values)
    rounded = torch.where(magnitude < 2.0**-14, small, normal).to(dtype)
    return torch.where(magnitude < 65536, rounded, nearest)


def _as_float(bits: torch.Tensor) -> torch.Tensor:
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def _step(
    op: str,
    update: _Update,
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    hypers: torch.Tensor,
    rng: torch.Tensor | None,
) -> None:
    for i, weight in enumerate(weights):
        check_index(op, index[i], rows[i], columns[i], *matrix_of(weight))
    first = 0
    for i, weight in enumerate(weights):
        offsets = offsets_of(index[i], rows[i], columns[i], matrix_of(weight)[1])
        flat, grad, own = weight.view(-1), grads[i], [several[i] for several in states]
        value = values[i] if values[i].numel() else flat[offsets].to(grad.dtype)
        numbers = hypers[i].tolist()
        updated, *fresh = update(value, numbers[3] * grad, numbers, *own)
        for old, new in zip(own, fresh, strict=True):
            if old.numel():
                old.copy_(new)
        if values[i].numel():
            values[i].copy_(updated)
        half = weight.dtype in (torch.bfloat16, torch.float16)
        if rng is not None and half:
            random = draws(first, updated.numel(), rng).to(weight.device)
            flat[offsets] = round_stochastic(updated, weight.dtype, random)
        else:
            flat[offsets] = updated.to(weight.dtype)
        first += updated.numel()


def _adamw(
    value: torch.Tensor, grad: torch.Tensor, hypers: list[float], *state: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    lr, decay, step, _, beta1, beta2, eps = hypers
    m = state[0] + (1 - beta1) * (grad - state[0])
    v = beta2 * state[1] + (1 - beta2) * grad * grad
    denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
    return value * (1 - lr * decay) - lr / (1 - beta1**step) * (m / denominator), m, v


def _sgd(
    value: torch.Tensor, grad: torch.Tensor, hypers: list[float], *state: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    lr, decay, step, _, momentum, dampening, nesterov = hypers
    grad = grad + decay * value
    buffer = state[0]
    if not buffer.numel():
        return value - lr * grad, buffer
    buffer = momentum * buffer + (1 - dampening) * grad if step > 1 else grad
    return value - lr * (grad + momentum * buffer if nesterov else buffer), buffer


def _lion(
    value: torch.Tensor, grad: torch.Tensor, hypers: list[float], *state: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    lr, decay, _, _, beta1, beta2, _ = hypers
    direction = state[0] + (1 - beta1) * (grad - state[0])
    m = state[0] + (1 - beta2) * (grad - state[0])
    return value * (1 - lr * decay) - lr * direction.sign(), m


@implement("masked_adamw_", "reference")
def masked_adamw_(weights, values, exp_avgs, exp_avg_sqs, *rest) -> None:  # type: ignore
    _step("masked_adamw_", _adamw, weights, values, (exp_avgs, exp_avg_sqs), *rest)


@implement("masked_sgd_", "reference")
def masked_sgd_(weights, values, momentum_buffers, *rest) -> None:  # type: ignore
    _step("masked_sgd_", _sgd, weights, values, (momentum_buffers,), *rest)


@implement("masked_lion_", "reference")
def masked_lion_(weights, values, exp_avgs, *rest) -> None:  # type: ignore
    _step("masked_lion_", _lion, weights, values, (exp_avgs,), *rest)
