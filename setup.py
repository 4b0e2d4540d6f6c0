"""Builds klflow_ext._C: C++ for the CPU (three instruction sets), CUDA where nvcc is found. One library on LibTorch's stable ABI.

Environment: KLFLOW_CUDA=auto|0|1 (default auto: CUDA kernels if nvcc is found), TORCH_CUDA_ARCH_LIST (default 9.0),
CXX, CUDA_HOME, MAX_JOBS.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # the oldest torch that the library runs under: 2.11
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}


def find_nvcc():
    """(path of nvcc or None, why it is or is not used)."""
    wish = os.environ.get("KLFLOW_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"KLFLOW_CUDA={wish!r}: allowed are auto, 0 and 1")
    if wish == "0":
        return None, "built with KLFLOW_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(p) for p in [shutil.which("nvcc")] if p] + [Path("/usr/local/cuda/bin/nvcc")]
    for path in candidates:
        if path.is_file():
            return str(path), ""
    if wish == "1":
        raise SystemExit("KLFLOW_CUDA=1 but no nvcc was found: put it on PATH or set CUDA_HOME")
    return None, "no nvcc was found at build time"


def cuda_arches():
    """The architectures to compile for, as nvcc numbers ('90'), PTX of the newest included."""
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0").strip())
    arches = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not of the form 9.0 or 9.0+PTX")
        if int(match[1]) >= 9:
            arches.append(match[1] + match[2] + match[3])
    if not arches:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={' '.join(names)}: the kernels need 9.0 (Hopper) or newer")
    return sorted(set(arches))


class NinjaBuild(build_ext):
    """Compiles every unit in parallel through ninja, with flags that differ from unit to unit."""

    def build_extension(self, ext):
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths  # only here: metadata needs no torch

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        includes = [f"-I{ROOT / 'csrc'}"] + [
            f"-isystem {p}" for p in [*include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
        ]
        common = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-DNDEBUG",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f'-DKLFLOW_TORCH_VERSION=\\"{torch.__version__}\\"',
        ]
        nvcc, reason = find_nvcc()
        objects, lines = [], []

        def unit(source, rule, flags, tag=""):
            name = str(source.relative_to(ROOT / "csrc")).replace("/", "_") + tag + ".o"
            lines.append(f"build {work / name}: {rule} {source}\n  flags = {' '.join(flags)}\n")
            objects.append(str(work / name))

        # -ffp-contract=fast is GCC's default: products and sums fuse where the instruction set has FMA.
        isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.name == "dispatch.cpp":
                continue
            for isa, flags in isas.items():
                unit(
                    source,
                    "cxx",
                    [
                        "-std=c++20",
                        "-O3",
                        "-fPIC",
                        "-fvisibility=hidden",
                        "-Wall",
                        "-Wno-psabi",
                        "-Wno-uninitialized",
                        "-Wno-maybe-uninitialized",
                        "-fno-math-errno",
                        "-fno-trapping-math",
                        "-fschedule-insns",  # the kernels are long chains side by side: worth 10 % on noise
                        "-fsched-pressure",
                        f"-DKLFLOW_ISA={isa}",
                        *flags,
                    ],
                    f".{isa}",
                )
        libraries = []
        cuda_flags = []
        if nvcc:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"release ([\d.]+)", version)[1]
            arches = cuda_arches()
            gencode = [f"-gencode arch=compute_{a},code=sm_{a}" for a in arches]
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                unit(source, "nvcc", ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode])
            cuda_flags = [
                "-DKLFLOW_WITH_CUDA",
                f'-DKLFLOW_NVCC_VERSION=\\"{version}\\"',
                f'-DKLFLOW_CUDA_ARCHES=\\"{",".join("sm_" + a for a in arches)}\\"',
            ]
        else:
            cuda_flags = [f'-DKLFLOW_CUDA_REASON=\\"{reason}\\"'.replace(" ", "\\ ")]
        unit(ROOT / "csrc" / "ops.cpp", "cxx", [*common, *cuda_flags, *includes])
        unit(ROOT / "csrc" / "cpu" / "dispatch.cpp", "cxx", [*common, *includes])
        # nvcc as the linker finds its own static CUDA runtime, wherever the toolkit lives.
        link = f"{nvcc} -shared -cudart static -Xlinker --exclude-libs=ALL" if nvcc else f"{cxx} -shared"
        torch_lib = library_paths()[0]
        libraries += [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
        (work / "build.ninja").write_text(
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule nvcc\n  command = {nvcc} -MMD -MF $out.d -I{ROOT / 'csrc'} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {link} $in {' '.join(libraries)} -o $out\n"
            + "".join(lines)
            + f"build {target}: link {' '.join(objects)}\n"
        )
        command = [sys.executable, "-m", "ninja", "-C", str(work)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        print(
            f"building {target.name}: {len(objects)} units, CUDA {'with ' + nvcc if nvcc else 'off: ' + reason}",
            flush=True,
        )
        subprocess.run(command, check=True)


setup(ext_modules=[Extension("klflow_ext._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
