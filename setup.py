"""Builds klflow_ext._C: C++ for the CPU (three instruction sets), CUDA where nvcc is found. One library on LibTorch's stable ABI.

Environment: KLFLOW_CUDA=auto|0|1 (default auto: CUDA kernels if nvcc is found), TORCH_CUDA_ARCH_LIST (default
8.0;8.6;8.9;9.0;10.0;12.0+PTX, as far as nvcc can; one entry compiles in a sixth of the time), CXX, CUDA_HOME, MAX_JOBS.
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
ARCHES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # what is compiled for unless TORCH_CUDA_ARCH_LIST says otherwise
OLDEST_ARCH = 8.0  # Ampere
LONGEST_UNITS = ("posterior", "topk_sample")  # of csrc/cuda: half of all the time
UNIT_GIGABYTES = 1.5  # of memory that a compiler needs: limits how many run at once
TORCH_TARGET = "0x020b000000000000"  # the oldest torch that the library runs under: 2.11
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]  # of every C++ unit
KERNEL_FLAGS = [  # of the CPU kernels. -ffp-contract=fast is GCC's default: products and sums fuse where there is FMA
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fschedule-insns",  # the kernels are long chains side by side: worth 10 % on noise
    "-fsched-pressure",
]
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


def cuda_arches(nvcc):
    """([(nvcc number like '90', whether PTX is embedded too)], why there are none) of TORCH_CUDA_ARCH_LIST or the default."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    arches = {}
    for name in re.split(r"[;,\s]+", wish or ARCHES):
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {name!r} is not of the form 9.0 or 9.0+PTX")
        number = match[1] + match[2]
        if float(f"{match[1]}.{match[2]}") < OLDEST_ARCH:
            print(f"TORCH_CUDA_ARCH_LIST: {name} is left out, the kernels need {OLDEST_ARCH} or newer", flush=True)
        elif number not in known:
            print(f"{name} is left out: {nvcc} knows no compute_{number}", flush=True)
        else:
            arches[number + match[3]] = match[4] is not None
    if not arches:
        return [], f"of TORCH_CUDA_ARCH_LIST={wish}, nothing is {OLDEST_ARCH} or newer and known to nvcc"
    if not wish and not any(arches.values()):  # an nvcc that does not know the last: PTX of the newest it knows
        arches[max(arches, key=int)] = True
    return sorted(arches.items(), key=lambda item: int(re.match(r"\d+", item[0])[0])), ""


def check_cuda_versions(nvcc, torch):
    """Says so where nvcc and torch are of different CUDA majors: the library brings its own CUDA runtime, which then needs a
    driver as new as nvcc."""
    if torch is not None and torch.split(".")[0] != nvcc.split(".")[0]:
        print(
            f"nvcc is of CUDA {nvcc}, torch of CUDA {torch}: the kernels need a driver of CUDA {nvcc} or newer; for an older "
            f"one put an nvcc of CUDA {torch} on PATH or into CUDA_HOME",
            flush=True,
        )


def jobs():
    """How many compilers run at once: by MAX_JOBS, else by processors and free memory."""
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = (
        re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        if Path("/proc/meminfo").exists()
        else None
    )
    fit = int(free[1]) / 2**20 / UNIT_GIGABYTES if free else processors
    return str(max(1, min(processors, int(fit))))


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
        # pybind11's own headers come first: torch 2.11 ships a copy of them that refuses to be included here.
        includes = [f"-I{ROOT / 'csrc'}"] + [
            f"-isystem {p}" for p in [pybind11.get_include(), *include_paths(), sysconfig.get_paths()["include"]]
        ]
        torch_flags = [  # of the units that see torch's headers
            *CXX_FLAGS,
            "-DNDEBUG",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f'-DKLFLOW_TORCH_VERSION=\\"{torch.__version__}\\"',
            *includes,
        ]
        nvcc, reason = find_nvcc()
        objects, lines = [], []

        def unit(source, rule, flags, tag=""):
            name = str(source.relative_to(ROOT / "csrc")).replace("/", "_") + tag + ".o"
            lines.append(f"build {work / name}: {rule} {source}\n  flags = {' '.join(flags)}\n")
            objects.append(str(work / name))

        libraries = []
        cuda_flags = []
        arches = []
        if nvcc:
            arches, reason = cuda_arches(nvcc)
        if arches:
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"release ([\d.]+)", version)[1]
            check_cuda_versions(version, torch.version.cuda)
            gencode = [f"-gencode arch=compute_{a},code=sm_{a}" for a, _ in arches]
            gencode += [f"-gencode arch=compute_{a},code=compute_{a}" for a, ptx in arches if ptx]
            names = ",".join(f"sm_{a}" + ("+PTX" if ptx else "") for a, ptx in arches)
            names_flag = f'-DKLFLOW_CUDA_ARCHES=\\"{names}\\"'
            # The longest first, before all others: what one processor compiles alone at the end is short then.
            sources = (ROOT / "csrc" / "cuda").glob("*.cu")
            for source in sorted(sources, key=lambda s: (s.stem not in LONGEST_UNITS, s)):
                flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", names_flag, *gencode]
                unit(source, "nvcc", flags)
            cuda_flags = ["-DKLFLOW_WITH_CUDA", f'-DKLFLOW_NVCC_VERSION=\\"{version}\\"', names_flag]
        else:
            print(f"without CUDA kernels: {reason}", flush=True)
            cuda_flags = [f'-DKLFLOW_CUDA_REASON=\\"{reason}\\"'.replace(" ", "\\ ").replace(";", "\\;")]
        isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.name == "dispatch.cpp":
                continue
            for isa, flags in isas.items():
                unit(source, "cxx", [*CXX_FLAGS, *KERNEL_FLAGS, f"-DKLFLOW_ISA={isa}", *flags], f".{isa}")
        for source in sorted((ROOT / "csrc" / "ops").glob("*.cpp")):
            unit(source, "cxx", [*torch_flags, *cuda_flags])
        unit(ROOT / "csrc" / "cpu" / "dispatch.cpp", "cxx", torch_flags)
        # nvcc as the linker finds its own static CUDA runtime, wherever the toolkit lives. --no-as-needed keeps libtorch.so,
        # empty in a torch without CUDA, among the libraries whose CUDA functions the loader binds in one that has them.
        link = f"{cxx} -shared -Wl,--no-as-needed"
        if arches:
            link = f"{nvcc} -shared -cudart static -Xlinker --exclude-libs=ALL -Xlinker --no-as-needed"
        torch_lib = library_paths()[0]
        libraries += [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
        (work / "build.ninja").write_text(
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule nvcc\n  command = {nvcc} -MMD -MF $out.d -I{ROOT / 'csrc'} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            f"rule link\n  command = {link} $in {' '.join(libraries)} -o $out\n"
            + "".join(lines)
            + f"build {target}: link {' '.join(objects)}\n"
        )
        ninja = [sys.executable, "-m", "ninja", "-C", str(work)]
        commands = subprocess.run([*ninja, "-t", "compdb", "cxx", "nvcc"], capture_output=True, text=True, check=True)
        folder = work.parent if work.parent == ROOT / "build" else work  # build/, where clangd and clang-tidy look
        (folder / "compile_commands.json").write_text(commands.stdout)
        cuda = f"{names} with {nvcc}" if arches else f"off: {reason}"
        print(f"building {target.name}: {len(objects)} units, CUDA {cuda}", flush=True)
        subprocess.run([*ninja, "-j", jobs()], check=True)


setup(ext_modules=[Extension("klflow_ext._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
