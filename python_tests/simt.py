"""Builds, at test time with ninja, libraries that stand in for the CPU kernels (see use_backend of klflow_ext._C):

- the SIMT machine of csrc/simt: the CUDA kernels as host code. KLFLOW_SIMT_DEVICE names the kind of device that it stands
  for (KINDS; sm_90), KLFLOW_SIMT_SANITIZE=1 adds AddressSanitizer and UBSan.
- the CPU kernels of one instruction set under these sanitizers. KLFLOW_CPU_SANITIZE=1 runs them in the tests of "cpu".

A process that loads a sanitized library needs libasan preloaded (see .ci/run).
"""

import ast
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SANITIZE_SIMT = os.environ.get("KLFLOW_SIMT_SANITIZE") == "1"
SIMT_FLAGS = "-x c++ -O1 -fno-strict-aliasing -Wno-unused-function -Wno-unknown-pragmas -DKLFLOW_SIMT"

# Kinds of devices: whether they have clusters, and shared memory in KB that a block may have and that a multiprocessor has.
# sm_89 is as sm_86 here, sm_100 and 103 are as sm_90.
KINDS = {"sm_80": (False, 163, 164), "sm_86": (False, 99, 100), "sm_90": (True, 227, 228), "sm_120": (True, 99, 100)}


def set_kind(library, name):
    """What device the machine of this library stands for."""
    clusters, block, processor = KINDS[name]
    ctypes.CDLL(str(library)).klflow_simt_device(
        ctypes.c_int(clusters), ctypes.c_int64(block << 10), ctypes.c_int64(processor << 10)
    )


def isa_flags():
    """ISA_FLAGS of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "ISA_FLAGS":
            return ast.literal_eval(node.value)


def build(folder, name, sources, flags=SIMT_FLAGS, sanitize=SANITIZE_SIMT):
    """The path of lib<name>.so, compiled from sources (paths) with csrc/ as include folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"{flags} -std=c++20 -g1 -fPIC -fvisibility=hidden -Wall"
    if sanitize:
        flags += " -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    link = "-fsanitize=address,undefined" if sanitize else ""
    cxx = os.environ.get("CXX", "g++")
    lines = [
        f"rule cxx\n  command = {cxx} {flags} -I{ROOT / 'csrc'} -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n",
        f"rule link\n  command = {cxx} -shared {link} $in -o $out\n",
    ]
    objects = []
    for source in sources:
        objects.append(folder / f"{Path(source).name}.o")
        lines.append(f"build {objects[-1]}: cxx {source}\n")
    target = folder / f"lib{name}.so"
    lines.append(f"build {target}: link {' '.join(map(str, objects))}\n")
    (folder / "build.ninja").write_text("".join(lines))
    ninja = shutil.which("ninja")
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # of libasan: a compiler would be slow under it
    done = subprocess.run([*command, "-C", str(folder)], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"building {target} failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return target


def kernels(folder):
    """The library of all CUDA kernels as host code."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted((ROOT / "csrc" / "simt").glob("*.cpp"))
    library = build(folder, "klflow_simt", sources)
    set_kind(library, os.environ.get("KLFLOW_SIMT_DEVICE", "sm_90"))
    return library


def sanitized_cpu_kernels(folder, isa):
    """The library of the CPU kernels of "baseline", "avx2" or "avx512", under the sanitizers."""
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) + [ROOT / "python_tests" / "cpu_backend.cpp"]
    flags = [
        "-O1 -fexpensive-optimizations -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
    ]
    flags += [*isa_flags()[isa], f"-DKLFLOW_ISA={isa}"]
    return build(folder, f"klflow_{isa}", [s for s in sources if s.name != "dispatch.cpp"], " ".join(flags), True)
