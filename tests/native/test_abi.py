"""The CPU extension as a library: what it needs, what it exports, which instructions it holds, and
that names and codes are the same on both sides of the binding."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

import pyfastft as ft
from pyfastft import _native
from pyfastft.native.lora._layers import ADAPTER, LAYER
from pyfastft.native.masked.select import SCORED
from pyfastft.native.masked.step import SEGMENT

CSRC = Path(__file__).parents[2] / "csrc"
API = (CSRC / "include/fastft/api.h").read_text()

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")
)


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(
        [*command, _native.cpu().__file__], capture_output=True, text=True, check=True
    ).stdout


def without_comments(code: str) -> str:
    return re.sub(r"//.*", "", code)


def declarations() -> dict[str, list[str]]:
    """Every function of api.h with its parameters' names."""
    found = re.findall(r"FT_API\s+[\w\s*]*?\b(ft_\w+)\((.*?)\);", without_comments(API), re.DOTALL)
    return {
        name: [re.search(r"(\w+)\s*$", p).group(1) for p in parameters.split(",") if p.strip()]
        for name, parameters in found
    }


def bound() -> dict[str, list[str]]:
    """Every line of ops.def: the C name, and the names of the Python arguments."""
    text = without_comments((CSRC / "include/fastft/ops.def").read_text())
    return {
        f"ft_{device.lower()}_{name}": re.findall(r'"(\w+)"', arguments)
        for device, name, arguments in re.findall(r"FT_(CPU|CUDA)_OP\((\w+),(.*?)\)", text, re.S)
    }


def enumerators(header: str, enum: str) -> dict[str, int]:
    text = without_comments((CSRC / "include/fastft" / header).read_text())
    body = re.search(rf"enum {enum}\s*:\s*\w+\s*{{(.*?)}}", text, re.DOTALL).group(1)
    return {name: int(value) for name, value in re.findall(r"FT_(\w+)\s*=\s*(\d+)", body)}


def test_nothing_but_the_language_runtimes_is_needed() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", tool("readelf", "-dW")))
    assert needed, "readelf printed no dependency"
    stems = {name.split(".so")[0].split("-")[0] for name in needed}
    assert stems <= {"libstdc++", "libgcc_s", "libm", "libc", "libgomp", "libpthread", "ld"}, needed


def test_the_abi_is_all_that_is_exported() -> None:
    exported = {line.split()[-1] for line in tool("nm", "-D", "--defined-only").splitlines()}
    cpu = {name for name in declarations() if not name.startswith("ft_cuda_")}
    assert exported == cpu | {"PyInit__cpu"}


def test_vector_instructions_stay_inside_their_level() -> None:
    """No VEX or EVEX instruction outside the namespaces of the levels: on a machine without AVX a
    shared template compiled with it would be an illegal instruction in scalar code."""
    if "x86-64" not in tool("objdump", "-f"):
        pytest.skip("not an x86-64 library")
    inside, outside, symbol = 0, set(), ""
    for line in tool("objdump", "-d", "--no-show-raw-insn", "-w").splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:", line):
            symbol = header.group(1)
        elif re.search(r"^\s*[0-9a-f]+:\s+(\{evex\} )?v[a-z]|%[yz]mm", line):
            if re.search(r"fastft\d+avx|\d(avx2|avx512|avx512_bf16)(E|\d)", symbol):
                inside += 1
            else:
                outside.add(symbol)
    assert inside > 1000, "no level was found: the names have changed"
    assert not outside


def test_dtype_codes_are_the_headers() -> None:
    names = {f"float{torch.finfo(d).bits}" if d is not torch.bfloat16 else "bfloat16": code
             for d, code in _native.DTYPES.items()}  # fmt: skip
    assert enumerators("dtype.h", "ft_dtype") == {n.upper(): code for n, code in names.items()}


def test_structs_have_the_fields_of_their_declarations() -> None:
    structs = {
        "ft_lora_layer": LAYER,
        "ft_lora_adapter": ADAPTER,
        "ft_masked_segment": SEGMENT,
        "ft_masked_scored": SCORED,
    }
    for name, fields in structs.items():
        body = re.search(rf"struct {name} {{(.*?)}};", without_comments(API), re.DOTALL).group(1)
        assert tuple(re.findall(r"(\w+)\s*[,;]", body)) == fields


def test_instruction_set_levels_are_the_headers() -> None:
    levels = enumerators("api.h", "ft_isa")
    assert levels == {name.upper(): i for i, name in enumerate(_native.ISA_LEVELS)}
    names = re.search(r"kNames\[\] = {(.*?)}", (CSRC / "cpu/dispatch.cpp").read_text()).group(1)
    assert tuple(re.findall(r'"(\w+)"', names)) == _native.ISA_LEVELS


def test_every_op_has_the_names_of_its_declaration() -> None:
    declared, operations = declarations(), bound()
    assert operations
    for name, arguments in operations.items():
        assert arguments == declared[name], name
    spelled = {name for name in declared if re.match(r"ft_(cpu|cuda)_(?!isa$|set_isa$)", name)}
    # The size of a buffer is asked for by a function of its own, bound by hand.
    assert {n for n in spelled if not n.endswith(("_workspace", "_bytes"))} == set(operations)


def arguments(name: str) -> dict[str, int]:
    return dict.fromkeys(bound()[f"ft_cpu_{name}"], 0)


@pytest.mark.parametrize("name", [n.removeprefix("ft_cpu_") for n in bound() if "_cpu_" in n])
def test_a_wrong_call_enters_no_kernel(name: str) -> None:
    function = getattr(_native.cpu(), name)
    good = arguments(name)
    with pytest.raises(TypeError):
        function(*good.values())
    with pytest.raises(TypeError):
        function(**good, surplus=0)
    for missing in good:
        with pytest.raises(TypeError):
            function(**{k: v for k, v in good.items() if k != missing})
    last = list(good)[-1]  # 32 bits: threads, or what comes last
    with pytest.raises(TypeError):
        function(**{**good, last: "many"})
    with pytest.raises(OverflowError):
        function(**{**good, last: 2**70})
    with pytest.raises(OverflowError):
        function(**{**good, last: 2**31})


@pytest.mark.parametrize("name", ["lora_linear", "lora_linear_backward"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": 7}, "unknown dtype code 7"),
        ({"dtype": 1, "adapter_dtype": 2}, "adapter dtype code 2"),
        ({"m": -1, "r": 1}, "m -1"),
        ({"r": 0}, "r 0"),
        ({"r": 1, "threshold": 65537}, "threshold 65537"),
        ({"r": 1, "threshold": 5}, "without rng"),
    ],
)
def test_a_failing_status_raises_its_message(name: str, wrong: dict[str, int], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        getattr(_native.cpu(), name)(**{**arguments(name), **wrong})


def test_a_level_that_does_not_run_here_is_refused() -> None:
    before = _native.cpu().isa()
    for level in (-1, before[0] + 1):
        with pytest.raises(RuntimeError, match=f"level {level} is not between 0 and {before[0]}"):
            _native.cpu().set_isa(level)
    assert _native.cpu().isa() == before


def test_a_kernel_releases_the_interpreter_lock(threads: None) -> None:
    torch.set_num_threads(1)
    x, weight = torch.randn(1024, 2048), torch.randn(1024, 2048)
    lora_a, lora_b = torch.randn(4, 2048), torch.randn(1024, 4)
    started = threading.Event()

    def kernel() -> None:
        started.set()
        ft.lora_linear(x, weight, lora_a, lora_b)

    with ft.backend("cpu"), _native.cpu_isa("scalar"):
        worker = threading.Thread(target=kernel)
        worker.start()
        started.wait()
        steps = 0
        while worker.is_alive():
            time.sleep(0.001)
            steps += 1
    # Some hundreds. With the lock held, the first step would return when the kernel has.
    assert steps > 20
