"""What setup.py decides (which architectures, how many compilers at once), and the device around a launch, without a GPU."""

import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch

import klflow_ext
from klflow_ext import _C

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, which is run without building."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def nvcc(tmp_path):
    """nvcc(numbers): the path of one that knows these architectures."""

    def make(*numbers):
        path = tmp_path / "nvcc"
        path.write_text("#!/bin/sh\n" + "".join(f"echo compute_{n}\n" for n in numbers))
        path.chmod(0o755)
        return str(path)

    return make


NEW = (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
OLD = (70, 75, 80, 86, 87, 89, 90)


@pytest.mark.parametrize(
    "wish,known,expected",
    [
        (None, NEW, [("80", False), ("86", False), ("89", False), ("90", False), ("100", False), ("120", True)]),
        (None, OLD, [("80", False), ("86", False), ("89", False), ("90", True)]),  # PTX of the newest it knows
        ("9.0", NEW, [("90", False)]),
        ("9.0+PTX", NEW, [("90", True)]),
        ("12.0+PTX 8.0;9.0a, 10.3", NEW, [("80", False), ("90a", False), ("103", False), ("120", True)]),
        ("7.5;8.6", NEW, [("86", False)]),
    ],
)
def test_architectures(setup_py, nvcc, monkeypatch, wish, known, expected):
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py["cuda_arches"](nvcc(*known)) == (expected, "")


@pytest.mark.parametrize("wish,known", [("7.0;7.5", NEW), ("12.0", OLD)])
def test_a_list_without_a_usable_entry_installs_the_cpu_library(setup_py, nvcc, monkeypatch, wish, known):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    arches, reason = setup_py["cuda_arches"](nvcc(*known))
    assert arches == [] and wish in reason


def test_a_malformed_list_is_refused(setup_py, nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_90")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: 'sm_90' is not of the form"):
        setup_py["cuda_arches"](nvcc(*NEW))


def test_cuda_of_another_major_is_told(setup_py, capsys):
    for of_torch in (None, "13.1"):
        setup_py["check_cuda_versions"]("13.0", of_torch)
        assert capsys.readouterr().out == ""
    setup_py["check_cuda_versions"]("13.0", "12.8")
    assert "nvcc is of CUDA 13.0, torch of CUDA 12.8" in capsys.readouterr().out


def test_compilers_at_once(setup_py, monkeypatch):
    """As many as there are processors, fewer where they would not fit into the free memory."""
    processors = int(setup_py["jobs"]())
    monkeypatch.setattr(Path, "read_text", lambda path: "MemAvailable: 4000000 kB\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64))
    assert processors >= 1 and setup_py["jobs"]() == "2"
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py["jobs"]() == "7"


def test_the_loader_looks_for_the_stream_function_in_torch():
    """A library that needs libtorch.so is bound to the CUDA functions behind it, whatever torch it was linked against."""
    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(re.findall(r"NEEDED.*\[(.*?)\]", needed))


# Two devices, of which 0 is the current one; a launch on 1 must see 1, and leave 0.
DEVICE = r"""
#include <cstdio>
#include "cuda/torch_stream.h"
int current = 0;
struct Guard {
  explicit Guard(int device) : before(current) { current = device; }
  ~Guard() { current = before; }
  int before;
};
int main() {
  int asked = -1, seen = -1;
  auto stream_of = [&](int device) { asked = current; return static_cast<void*>(&current + device); };
  klflow::with_current_device<Guard>(1, stream_of, [&](void* stream) { seen = stream == &current + 1 ? current : -1; });
  bool thrown = false;
  try {
    klflow::with_current_device<Guard>(1, stream_of, [&](void*) { throw std::runtime_error("no kernel image"); });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  bool refused = false;
  try {
    klflow::torch_stream(0);
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("this torch has no CUDA") == 0;
  }
  std::printf("%d %d %d %d %d", asked, seen, current, thrown, refused);
}
"""


@pytest.fixture
def compiled(tmp_path):
    """compiled(source, *options): what the C++ program prints."""

    def run(source, *options):
        path, program = tmp_path / "program.cpp", tmp_path / "program"
        path.write_text(source)
        command = ["g++", "-std=c++20", f"-I{ROOT / 'csrc'}", *options, str(path), "-ldl", "-o", str(program)]
        subprocess.run(command, check=True)
        return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout

    return run


def test_a_launch_sees_the_device_of_its_tensors(compiled):
    assert compiled(DEVICE) == "1 1 0 1 1"


# torch's CUDA library, loaded as torch does it: the loader binds nothing of it, so it is looked up.
STREAM = r"""
#include <cstdio>
#include "cuda/torch_stream.h"
int main() {
  if (dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL) == nullptr) return 1;
  std::printf("%s, %d", klflow::stream_source(), static_cast<int>(reinterpret_cast<intptr_t>(klflow::torch_stream(3))));
}
"""


def test_the_stream_function_is_looked_up_where_the_loader_did_not_bind_it(compiled, tmp_path):
    source, library = tmp_path / "fake.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {\n'
        "  *stream = reinterpret_cast<void*>(100 + device);\n  return 0;\n}\n"
    )
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source), "-o", str(library)], check=True
    )
    assert compiled(STREAM, f'-DLIBRARY="{library}"') == "found in libtorch_cuda.so, 103"


# Two devices of compute capability 7.5 and 9.0, and a driver of CUDA 12.8.
FAKE_RUNTIME = r"""
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorInsufficientDriver, cudaErrorNoKernelImageForDevice,
                   cudaErrorUnsupportedPtxVersion, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                      cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                      cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
#define CUDART_VERSION 13000
inline int current = 0, asked = 0, set = 0, largest[2] = {};
inline cudaError_t refuses = cudaSuccess;
inline cudaError_t cudaGetDevice(int* index) { return *index = current, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  constexpr int values[2][5] = {{7, 5, 65536, 65536, 40}, {9, 0, 232448, 233472, 132}};
  ++asked;
  return *value = values[index][attribute], cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12080, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid" : "wrong"; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (refuses != cudaSuccess) return refuses;
  ++set;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) largest[current] = value;
  return cudaSuccess;
}
"""
RUNTIME = r"""
#include <cstdio>
#include "cuda/runtime.h"
using namespace klflow::cuda;
int main() {
  for (cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInsufficientDriver, cudaErrorUnsupportedPtxVersion,
                            cudaErrorInvalidValue})
    std::puts(text_of(error));
  asked = 0;
  for (int call = 0; call < 3; ++call)
    for (current = 0; current < 2; ++current)
      std::printf("%d %d;", device().clusters, static_cast<int>(device().block_bytes));
  std::printf("\n%d asked\n", asked);
  const int kernels[2] = {};
  for (int call = 0; call < 3; ++call)
    for (current = 0; current < 2; ++current)
      for (const int& kernel : kernels) allow_shared_memory(&kernel, device().block_bytes);
  std::printf("%d set, %d %d\n", set, largest[0], largest[1]);
  current = 0;
  refuses = cudaErrorInvalidValue;
  const int failed = allow_shared_memory(&current, 1);
  refuses = cudaSuccess;
  allow_shared_memory(&current, 1);
  std::printf("%d %d\n", failed == cudaErrorInvalidValue, set);
}
"""


@pytest.fixture
def runtime(compiled, tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(FAKE_RUNTIME)
    return compiled(RUNTIME, f"-I{tmp_path}", '-DKLFLOW_CUDA_ARCHES="sm_80,sm_90+PTX"').splitlines()


def test_errors_of_a_wrong_build_say_what_was_built_and_what_is_here(runtime):
    built = "wrong: klflow_ext was built for sm_80,sm_90+PTX by CUDA 13.0; "
    driver = "the driver is of CUDA 12.8: update it, or build with an older nvcc"
    assert runtime[:4] == [
        f"{built}device 0 has compute capability 7.5: build with it in TORCH_CUDA_ARCH_LIST, from 8.0 on",
        built + driver,
        built + driver,
        "invalid",
    ]


def test_a_device_is_asked_once_and_a_kernel_told_once(runtime):
    assert runtime[4] == "0 65536;1 232448;" * 3
    assert runtime[5] == "8 asked"
    assert runtime[6] == "8 set, 65536 232448"  # two attributes of two kernels on two devices
    assert runtime[7] == "1 10"  # what failed is tried again


def test_every_launch_goes_through_the_device_guard():
    sources = [path.read_text() for path in sorted((ROOT / "csrc" / "ops").iterdir())]
    lines = [line.strip() for source in sources for line in source.splitlines()]
    calls = [line for line in lines if "cuda::" in line and not line.startswith("//")]
    assert len(calls) == 2 and all("on_device_of" in line or line.startswith("scratch = ") for line in calls), calls


def test_every_operator_checks_the_device_of_every_tensor():
    inner = {"logit_interpolate": "logit_interpolate_out", "cross_entropy": "cross_entropy_out",
             "cross_entropy_total": "cross_entropy"}  # what these pass all their tensors to  # fmt: skip
    found = set()
    for path in sorted((ROOT / "csrc" / "ops").glob("*.cpp")):
        source = re.sub(r'"\s*\n\s*"', "", path.read_text())  # schemas in one piece
        for name, schema in re.findall(r'KLFLOW(?:_CPU)?_OPERATOR\(\s*(\w+),\s*"(.*?)"\)', source, re.S):
            tensors = re.findall(r"Tensor(?:\(\w!\))?\??\s+(\w+)", schema.split("->")[0])
            body = re.search(rf"\b{name}\(Tensor[^{{]*\{{(.*?)\n\}}", source, re.S)[1]
            checked = re.match(r"\s*KLFLOW_CHECK_DEVICES\((.*?)\);", body, re.S)
            assert checked[1].split(", ") == tensors if checked else f"{inner[name]}({', '.join(tensors)}," in body, (
                name
            )
            found.add(name)
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    assert found == {name.removeprefix("klflow::") for name in registered if name.startswith("klflow::")}


def test_the_source_distribution_holds_all_that_is_built(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([*command, "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    source = {str(p.relative_to(ROOT)) for folder in ("csrc", "klflow_ext") for p in (ROOT / folder).rglob("*")
              if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".typed")}  # fmt: skip
    assert {"csrc/ops/loss.cpp", "csrc/cuda/row.cuh", "klflow_ext/ops/loss.py"} <= source
    assert source | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held


def test_the_version_is_written_once():
    place = re.compile(rf"version[_\W]+{re.escape(klflow_ext.__version__)}\b")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "klflow_ext").rglob("*.py"))]
    assert [f.name for f in files if place.search(f.read_text())] == ["__init__.py"]
