"""What the compiler made of the CUDA kernels, read from the installed library without a GPU: code for every architecture that
it was built for, no register spills, no local memory, at most 64 registers so that two blocks of 512 threads share a
multiprocessor, 128-bit accesses where rows are read and written. Prints the table (pytest -s). And, of kernels compiled for it,
that they need no more instructions an element than benchmarks/sass.py once counted."""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from klflow_ext import _C, build_info

# kernel: (reads rows from global memory, writes rows to it), 128 bits at a time
VECTORIZED = {
    "cross_entropy": (True, True),
    "noise_interpolate": (False, True),
    "logit_interpolate": (True, True),
    "topk_sample": (True, False),
    "topk_renoise": (True, True),
    "euler_step": (True, True),
    "softmax_expectation": (True, False),
    "noise_tile": (False, True),
    "posterior": (True, False),
    "gather_rows": (True, False),
    "scatter_rows": (True, False),
}
ARCHES = [name for name in build_info()["cuda_arch"].split(",") if name]


def nvidia_tools():
    """The folder of cuobjdump and nvdisasm: on PATH, or of the wheels beside this Python's packages."""
    found = shutil.which("cuobjdump")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin"))
    return next((f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file()), None)


@pytest.fixture(scope="module")
def cuobjdump():
    """cuobjdump(options): its lines on the installed library that match the pattern."""
    folder = nvidia_tools()
    assert folder is not None, "needed are nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (extra: test)"
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C"}

    def run(*options, pattern="."):
        command = [str(folder / "cuobjdump"), *options, _C.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as dump:  # of 2 GB of text few lines count
            lines = subprocess.run(["grep", "-aE", pattern], stdin=dump.stdout, capture_output=True, text=True).stdout
        return lines.splitlines()

    return run


def kernel_of(function):
    """The op of a mangled kernel name."""
    return re.search(r"(\w+?)_kernel", function.removeprefix("_ZN6klflow4cuda").lstrip("0123456789"))[1]


@pytest.mark.skipif(not ARCHES, reason=build_info()["cuda_reason"])
def test_there_is_code_for_every_architecture(cuobjdump):
    built = set(re.findall(r"\.(sm_\w+)\.cubin", "\n".join(cuobjdump("-lelf"))))
    assert {name.removesuffix("+PTX") for name in ARCHES} <= built
    ptx = set(re.findall(r"\.(sm_\w+)\.ptx", "\n".join(cuobjdump("-lptx"))))
    assert ptx == {name.removesuffix("+PTX") for name in ARCHES if name.endswith("+PTX")}


@pytest.mark.parametrize("arch", [name.removesuffix("+PTX") for name in ARCHES])
def test_registers_and_memory(cuobjdump, arch):
    lines = iter(cuobjdump("--dump-resource-usage", "-arch", arch, pattern="Function|REG:"))
    kernels = {}
    for line in lines:
        name = re.search(r"Function (\w+):", line)[1]
        kernels[name] = [
            int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", next(lines)).groups()
        ]
    assert {kernel_of(name) for name in kernels} == VECTORIZED.keys()
    for name, (registers, stack, local) in kernels.items():
        print(f"{arch:7} {name:90} {registers:3} registers {stack:3} B stack {local:3} B local")
        assert stack == local == 0 and registers <= 64, name


@pytest.mark.parametrize("arch", [name.removesuffix("+PTX") for name in ARCHES])
def test_rows_are_read_and_written_128_bits_at_a_time(cuobjdump, arch):
    accesses, kernel = {}, None
    for line in cuobjdump("-sass", "-arch", arch, pattern=r"Function : |\b(LDG|STG)\.[^ ]*128"):
        function = re.search(r"Function : (\w+)", line)
        if function:
            kernel = accesses.setdefault(function[1], set())
        else:
            kernel.add(re.search(r"\b(LDG|STG)\.", line)[1])
    assert {kernel_of(name) for name in accesses} == VECTORIZED.keys()
    for name, found in accesses.items():
        loads, stores = VECTORIZED[kernel_of(name)]
        assert not loads or "LDG" in found, f"{name}: no 128-bit load from global memory"
        assert not stores or "STG" in found, f"{name}: no 128-bit store to global memory"


# (kernel, dtype): the most instructions an element
GOALS = {
    ("cross_entropy", "bfloat16"): 9,
    ("cross_entropy + gradient", "bfloat16"): 18,
    ("noise_interpolate", "bfloat16"): 26,
    ("noise_interpolate, log", "bfloat16"): 29,
    ("topk_sample", "bfloat16"): 2,
    ("posterior", "float32"): 40,
}


def test_instructions_per_element():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "sass.py"
    spec = importlib.util.spec_from_file_location("sass", path)
    sass = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sass)
    nvcc, folder = sass.tools()
    if nvcc is None or folder is None:
        pytest.skip("no nvcc" if nvcc is None else "no cuobjdump and nvdisasm (extra: test)")
    results = sass.measure()
    sass.print_table(results)
    counted = {(r["kernel"], r["dtype"]): r["instructions"] for r in results}
    assert {key: counted[key] for key, most in GOALS.items() if counted[key] > most} == {}
