"""What setup.py decides (which architectures, how many compilers at once), and the device around a launch, without a GPU."""

import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

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
    for torch in (None, "13.1"):
        setup_py["check_cuda_versions"]("13.0", torch)
        assert capsys.readouterr().out == ""
    setup_py["check_cuda_versions"]("13.0", "12.8")
    assert "nvcc is of CUDA 13.0, torch of CUDA 12.8" in capsys.readouterr().out


def test_compilers_at_once(setup_py, monkeypatch):
    assert int(setup_py["jobs"]()) >= 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py["jobs"]() == "7"


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


def test_a_launch_sees_the_device_of_its_tensors(tmp_path):
    source, program = tmp_path / "device.cpp", tmp_path / "device"
    source.write_text(DEVICE)
    subprocess.run(["g++", "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-ldl", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1 0 1 1"


def test_every_launch_goes_through_the_device_guard():
    sources = [path.read_text() for path in sorted((ROOT / "csrc" / "ops").iterdir())]
    lines = [line.strip() for source in sources for line in source.splitlines()]
    calls = [line for line in lines if "cuda::" in line and not line.startswith("//")]
    assert len(calls) == 2 and all("on_device_of" in line or line.startswith("scratch = ") for line in calls), calls


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
