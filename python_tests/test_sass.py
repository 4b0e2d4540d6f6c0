"""What the compiler made of the CUDA kernels, read without a GPU: no register spills, 128-bit accesses where rows are read
and written, at most 64 registers so that two blocks of 512 threads share a multiprocessor. Prints the table (pytest -s)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else None)
# kernel: (needs 128-bit loads of the row, needs 128-bit stores)
VECTORIZED = {
    "cross_entropy": (True, True),
    "noise_interpolate": (True, True),
    "logit_interpolate": (True, True),
    "topk_sample": (True, True),
    "topk_renoise": (True, True),
    "euler_step": (True, True),
}


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
        assert spills == 0 and registers <= 64, name
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None or shutil.which("nvdisasm") is None:
        return  # the instruction check needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
    sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for body in sass.split("Function : ")[1:]:
        name = body.split()[0]
        for op, (loads, stores) in VECTORIZED.items():
            if f"{op}_kernel" in name:
                assert not loads or re.search(r"\bLD[GS]?\.E?\.?\S*128|\bLD[GS]?\S*\.128", body), (
                    f"{name}: no 128-bit load"
                )
                assert not stores or re.search(r"\bST[G]?\S*\.128", body), f"{name}: no 128-bit store"
