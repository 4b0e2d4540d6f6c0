"""The CPU kernels' own exp2 and log2: their errors over dense sweeps, for each instruction set."""

import subprocess

import pytest
from simt import ROOT, isa_flags

from klflow_ext import build_info


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_errors(isa, tmp_path):
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(build_info()["cpu_capability"]):
        pytest.skip(f"this processor has no {isa}")
    program = tmp_path / "cpu_math"
    flags = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-DKLFLOW_ISA={isa}"]
    source = ROOT / "python_tests" / "cpu_math.cpp"
    subprocess.run(
        ["g++", *flags, *isa_flags()[isa], f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True
    )
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    worst = {name: float(value) for name, value in (line.split() for line in lines)}
    assert worst["exp2v"] <= 2.0  # units in the last place
    assert worst["exp2_chains"] <= 2.5e-7  # relative
    assert worst["log2_chains"] <= 3e-7  # relative, down to log2(1 - 2^-24)
    assert worst["log2_absolute_chains"] <= 2e-7  # of max(1, |log2 x|)
    assert worst["edges"] == 1
