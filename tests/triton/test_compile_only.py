"""Every launch of the Triton kernels compiles for sm_80, sm_90 and sm_100, with no GPU: no spills,
shared memory within the device's limit, tensor cores where half precision is multiplied.

The interpreter accepts kernels that do not compile, so both kinds of test are needed. The compiler
runs in a process of its own, without TRITON_INTERPRET; Triton's cache, keyed by the source, makes a
second run cheap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / f"pyfastft-triton-cache-{os.getuid()}"
# What one block may have: CUDA programming guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_INSTRUCTION = {
    80: {"mma.sync"},
    90: {"wgmma.mma", "mma.sync"},
    100: {"tcgen05.mma", "mma.sync"},
}
STAGES = {"_lora_project_kernel", "_lora_update_kernel", "_lora_gradient_kernel"}
PRODUCTS = {"_lora_gemm_kernel", "_lora_decode_kernel", "_lora_decode_sum_kernel"}
METHODS = {
    "_lora_update_all_kernel",
    "_dora_norm_kernel",
    "_scale_columns_kernel",
    "_scale_columns_backward_kernel",
}
INT4 = {"_int4_dequantize_kernel", "_int4_product_kernel", "_int4_add_parts_kernel"}
INT4_DX = {"_int4_gradient_kernel", "_int4_add_parts_kernel"}
SUMS = {"_abs_row_sums_kernel", "_abs_row_sums_backward_kernel"}
ACTIVATIONS = {
    "_quantize_kernel",
    "_int4_bytes_kernel",
    "_fake_quantize4_kernel",
    "_fake_quantize4_backward_kernel",
    "_int8_product_kernel",
    "_int8_scale_gradient_kernel",
}
MASKED = {
    "_masked_gather_kernel",
    "_masked_scatter_kernel",
    "_masked_merge_kernel",
    "_masked_step_kernel",
    "_mark_kernel",
    "_count_digits_kernel",
    "_choose_digit_kernel",
    "_collect_kernel",
    "_rectangle_grad_kernel",
    "_element_grad_kernel",
    "_entry_grad_kernel",
}
PRUNE = {"_block_product_kernel", "_block_grad_kernel"}
# Sizes that are not aligned change how operands are loaded, which one precision shows, and the odd
# ones more than multiples of eight; the others take minutes.
CASES = [
    pytest.param(
        alignment,
        precision,
        marks=pytest.mark.slow
        if alignment == "eight" or (alignment == "odd" and precision != "bf16-bf16")
        else pytest.mark.more,
    )
    for alignment in ("aligned", "odd", "eight")
    for precision in ("bf16-bf16", "fp32-fp32", "bf16-fp32")
]
# A rank per tile of ranks, and one that Triton cannot align.
RANKS = {"bf16-bf16": "10,16,32,64", "fp32-fp32": "10,16,32", "bf16-fp32": "10,16,32"}


def compile_kernels(*arguments: str, script: str = "compile_stages.py") -> list[dict]:
    """One row per kernel that the script compiles, given its arguments."""
    environment = dict(os.environ, TRITON_CACHE_DIR=os.environ.get("TRITON_CACHE_DIR", str(CACHE)))
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(rows: list[dict], kernels: set[str]) -> None:
    assert {row["kernel"] for row in rows} >= kernels
    for row in rows:
        architecture = row["architecture"]
        assert row["stack"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[architecture], f"shared memory: {row}"
        if row["half"]:
            found = MATRIX_INSTRUCTION[architecture] & set(row["matrix"])
            assert found, f"no tensor-core instruction: {row}"


def test_launches_compile_without_spills() -> None:
    rows = compile_kernels("90", "aligned", "bf16-bf16", "16", "stages,product,methods")
    check(rows, STAGES | PRODUCTS | METHODS | SUMS)
    rows = compile_kernels("90", "aligned", "bf16-bf16", "128", "int4-first,int4-dx-first")
    check(rows, INT4 | INT4_DX)


@pytest.mark.parametrize(("alignment", "precision"), CASES)
@pytest.mark.parametrize(("kernels", "found"), [("stages", STAGES), ("products", PRODUCTS)])
def test_every_launch_compiles_without_spills(
    alignment: str, precision: str, kernels: str, found: set[str]
) -> None:
    check(compile_kernels("80,90,100", alignment, precision, RANKS[precision], kernels), found)


@pytest.mark.parametrize(("alignment", "precision"), CASES)
def test_methods_compile_without_spills(alignment: str, precision: str) -> None:
    # U, V and W have one dtype.
    found = METHODS if precision == "bf16-fp32" else METHODS | SUMS
    check(compile_kernels("80,90,100", alignment, precision, RANKS[precision], "methods"), found)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("fp16-fp16", marks=pytest.mark.more),
        pytest.param("fp16-fp32", marks=pytest.mark.slow),
    ],
)
def test_float16_compiles_as_bfloat16_does(precision: str) -> None:
    rows = compile_kernels("80,90,100", "aligned,odd", precision, "16", "stages,product,methods")
    check(rows, STAGES | PRODUCTS | METHODS)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("bf16-bf16", marks=pytest.mark.more),
        pytest.param("fp16-fp16", marks=pytest.mark.slow),
        pytest.param("fp32-fp32", marks=pytest.mark.more),
    ],
)
@pytest.mark.parametrize("alignment", ["aligned", "odd"])
def test_4_bit_weights_compile_without_spills(alignment: str, precision: str) -> None:
    """Groups of a tile and more, of half a tile, and, where nothing is aligned, of parts of one."""
    groups = "128,24" if alignment == "odd" else "128,32"
    check(compile_kernels("80", alignment, precision, groups, "int4-narrow"), INT4)
    check(compile_kernels("90,100", alignment, precision, groups, "int4"), INT4)


@pytest.mark.parametrize(
    ("alignment", "precision", "groups"),
    [
        pytest.param("aligned", "bf16-fp32", "128", marks=pytest.mark.more),
        pytest.param("aligned", "fp16-fp16", "128", marks=pytest.mark.slow),
        pytest.param("aligned", "fp32-fp32", "128", marks=pytest.mark.slow),
        pytest.param("odd", "bf16-fp32", "128,32", marks=pytest.mark.slow),
    ],
)
def test_dx_of_4_bit_weights_compiles_without_spills(
    alignment: str, precision: str, groups: str
) -> None:
    check(compile_kernels("80", alignment, precision, groups, "int4-dx-narrow"), INT4_DX)
    check(compile_kernels("90,100", alignment, precision, groups, "int4-dx"), INT4_DX)


def compile_activations(*arguments: str) -> list[dict]:
    return compile_kernels(*arguments, script="compile_ptq4_activations.py")


def test_activations_compile_without_spills() -> None:
    check(compile_activations("90", "aligned", "bf16", "128", "some"), ACTIVATIONS)


@pytest.mark.more
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("alignment", ["aligned", "odd"])
def test_every_activation_compiles_without_spills(alignment: str, dtype: str) -> None:
    check(compile_activations("80,90,100", alignment, dtype, "128,50", "every"), ACTIVATIONS)


@pytest.mark.parametrize(
    ("architectures", "alignments", "dtypes", "kernels"),
    [
        pytest.param("90", "aligned", "bf16", "every", marks=pytest.mark.more),
        pytest.param("80,100", "odd", "bf16,fp32", "some", marks=pytest.mark.more),
        # Ten minutes and more.
        pytest.param("80,90,100", "aligned,odd", "bf16,fp32,fp16", "every", marks=pytest.mark.slow),
    ],
)
def test_masked_kernels_compile_for_every_device(
    architectures: str, alignments: str, dtypes: str, kernels: str
) -> None:
    arguments = (architectures, alignments, dtypes, kernels)
    check(compile_kernels(*arguments, script="compile_masked.py"), MASKED)


@pytest.mark.parametrize(
    ("architectures", "alignments", "dtypes", "blocks"),
    [
        pytest.param("90", "aligned", "bf16", "32x32,128x64", marks=pytest.mark.more),
        pytest.param("80", "odd", "fp32", "32x64", marks=pytest.mark.more),
        pytest.param("80,90,100", "aligned,odd", "bf16,fp32,fp16", "every", marks=pytest.mark.slow),
    ],
)
def test_block_sparse_kernels_compile_for_every_device(
    architectures: str, alignments: str, dtypes: str, blocks: str
) -> None:
    arguments = (architectures, alignments, dtypes, blocks)
    check(compile_kernels(*arguments, script="compile_prune.py"), PRUNE)
