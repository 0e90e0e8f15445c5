"""The ptq4 family beyond what the registry's tests hold every op to."""

from __future__ import annotations

import torch

import pyfastft as ft


def test_the_order_of_nibbles_and_of_features() -> None:
    codes = torch.tensor([[0x10, 0x32, 0x04]], dtype=torch.uint8)  # 0 1 2 3 4
    scale = torch.tensor([[1.0, 10.0, 100.0]])
    zero = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    perm = torch.tensor([4, 2, 0, 1, 3], dtype=torch.int32)
    weight = ft.functional.int4_dequantize(codes, scale, zero=zero, perm=perm, k=5, group_size=2)
    assert weight.tolist() == [[10.0, 20.0, 1.0, 200.0, 0.0]]
