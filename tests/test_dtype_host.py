"""The headers that host and device share, compiled for the host: conversions of element types, and
the random numbers of dropout."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pyfastft._random import dropout_scale
from pyfastft.reference._dropout import philox4x32
from pyfastft.testing.tolerance import assert_exact

INCLUDE = Path(__file__).parents[1] / "csrc" / "include"
SOURCE = r"""
#include "fastft/dtype.h"
#include "fastft/philox.h"
using namespace fastft;
extern "C" {
void widen_bf16(float* y, const bf16* x, int64_t n) { while (n--) y[n] = to_float(x[n]); }
void widen_fp16(float* y, const fp16* x, int64_t n) { while (n--) y[n] = to_float(x[n]); }
void narrow_bf16(bf16* y, const float* x, int64_t n) {
  while (n--) y[n] = from_float<bf16>(x[n]);
}
void narrow_fp16(fp16* y, const float* x, int64_t n) {
  while (n--) y[n] = from_float<fp16>(x[n]);
}
void philox(uint32_t* y, uint64_t seed, uint64_t counter, uint64_t offset) {
  const Philox4 words = philox4x32(seed, counter, offset);
  for (int i = 0; i < 4; ++i) y[i] = words.word[i];
}
int keeps(const int64_t* rng, uint32_t threshold, int64_t element) {
  return dropout_keeps(make_dropout(rng, threshold), element);
}
float scale(const int64_t* rng, uint32_t threshold) { return make_dropout(rng, threshold).scale; }
}
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [*compiler.split(), *flags, f"-I{INCLUDE}", "host.cpp", "-o", "host.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "host.so"))
    library.scale.restype = ctypes.c_float
    return library


HALVES = pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=["bf16", "fp16"]
)


def call(function: ctypes._CFuncPtr, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (y, x))
    function(*pointers, ctypes.c_int64(x.numel()))
    return y


def assert_same_floats(actual: torch.Tensor, expected: torch.Tensor, bits: torch.dtype) -> None:
    """Equal bits, the sign of zero included; a NaN where one is due, whatever its payload."""
    nan = expected.isnan()
    assert_exact(actual.isnan(), nan)
    assert_exact(actual.view(bits)[~nan], expected.view(bits)[~nan])


@HALVES
def test_every_half_widens_as_in_torch(headers, dtype: torch.dtype, name: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    actual = call(getattr(headers, f"widen_{name}"), x, torch.float32)
    assert_same_floats(actual, x.float(), torch.int32)


@HALVES
def test_floats_narrow_as_in_torch(headers, dtype: torch.dtype, name: str) -> None:
    """Every upper half of a float, above lower halves around each tie, and ties between halves."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    ties = [1 << bit for bit in range(16)]
    lower = sorted({0, 0xFFFF, *ties, *(t - 1 for t in ties), *(t + 1 for t in ties), 0xAAAA})
    x = (upper | torch.tensor(lower, dtype=torch.int32)).reshape(-1).view(torch.float32)
    below = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    between = (below[1:] + below[:-1]) / 2
    around = [between.nextafter(torch.tensor(v)) for v in (-torch.inf, torch.inf)]
    x = torch.cat([x, between, -between, *around])
    actual = call(getattr(headers, f"narrow_{name}"), x, dtype)
    assert_same_floats(actual, x.to(dtype), torch.int16)


# Counter (low word first), key, result: the known answers that come with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(headers, counter, key, words) -> None:
    low_first = [a | b << 32 for a, b in (key, counter[:2], counter[2:])]
    out = (ctypes.c_uint32 * 4)()
    headers.philox(out, *map(ctypes.c_uint64, low_first))
    assert tuple(out) == words


@pytest.mark.parametrize("threshold", [0, 1, 6554, 32768, 65535, 65536])
def test_the_mask_is_the_references(headers, threshold: int) -> None:
    rng = torch.tensor([-(2**62) - 5, 2**40 + 3])
    address = ctypes.c_void_p(rng.data_ptr())
    elements = [*range(64), *(2**bit + i for bit in (31, 32, 33, 35, 36, 45) for i in range(-9, 9))]
    groups = torch.tensor(elements) // 8
    words = torch.stack(philox4x32(rng[0], groups, rng[1]), dim=-1)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1, 8)
    for element, draw in zip(elements, draws, strict=True):
        keeps = headers.keeps(address, ctypes.c_uint32(threshold), ctypes.c_int64(element))
        assert keeps == (draw[element % 8].item() >= threshold)
    exact = torch.tensor(dropout_scale(threshold), dtype=torch.float32).item()
    assert headers.scale(address, ctypes.c_uint32(threshold)) == exact


def test_without_rng_nothing_is_dropped(headers) -> None:
    assert headers.keeps(None, ctypes.c_uint32(65536), ctypes.c_int64(0)) == 1
