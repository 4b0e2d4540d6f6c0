"""What the compiler made of the CUDA kernels, read without a GPU: no register spills, no local memory, 128-bit accesses where rows are read
and written, at most 64 registers so that two blocks of 512 threads share a multiprocessor. Prints the table (pytest -s)."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else None)
# kernel: (reads rows from global memory, writes rows to it), 128 bits at a time
VECTORIZED = {
    "cross_entropy": (True, True),
    "noise_interpolate": (False, True),
    "logit_interpolate": (True, True),
    "topk_sample": (True, False),
    "topk_renoise": (True, True),
    "euler_step": (True, True),
    "noise_tile": (False, True),
    "posterior": (True, False),
    "gather_rows": (True, False),
    "scatter_rows": (True, False),
}


def nvidia_tools():
    """The folder of cuobjdump and nvdisasm: on PATH, or of the wheels beside this Python's packages."""
    found = shutil.which("cuobjdump")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin"))
    return next((f for f in folders if (f / "cuobjdump").is_file() and (f / "nvdisasm").is_file()), None)


def report(source, folder):
    """{kernel instance: (registers, stack bytes, spill bytes)} from ptxas, and the cubin's path."""
    cubin = folder / f"{source.stem}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return {name: (int(regs), int(stack), int(a) + int(b)) for name, stack, a, b, regs in found}, cubin


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_compiled_kernels(source, tmp_path):
    kernels, cubin = report(source, tmp_path)
    assert kernels
    for name, (registers, stack, spills) in kernels.items():
        print(f"{name:90} {registers:3} registers {stack:3} B stack {spills:3} B spilled")
        assert spills == 0 and stack == 0 and registers <= 64, name
    folder = nvidia_tools()
    assert folder is not None, (
        "the instruction check needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm (extra: test)"
    )
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), "-sass", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    bodies = {body.split()[0]: body for body in sass.split("Function : ")[1:]}
    assert set(bodies) == set(kernels)
    for name, body in bodies.items():
        loads, stores = VECTORIZED[
            re.search(r"(\w+?)_kernel", name.removeprefix("_ZN6klflow4cuda").lstrip("0123456789"))[1]
        ]
        assert not loads or re.search(r"\bLDG\.\S*128", body), f"{name}: no 128-bit load from global memory"
        assert not stores or re.search(r"\bSTG\.\S*128", body), f"{name}: no 128-bit store to global memory"
