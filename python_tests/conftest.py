import fcntl
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import simt

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the processors: idle threads of OpenMP must not spin on them
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from klflow_ext import _C, build_info  # noqa: E402

# "simt" runs the CUDA kernels on CPU tensors, compiled as host code against csrc/simt.
BACKENDS = ["cpu", "simt"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_collection_modifyitems(config, items):
    """Marks as `quick` what neither compiles nor runs for long: `pytest -m quick` is for the work on the package. Leaves out
    many rows on "simt", where each is a block of its own: for the CPU they are the work of several threads."""
    many = [item for item in items if hasattr(item, "callspec") and many_rows_on_simt(**item.callspec.params)]
    config.hook.pytest_deselected(items=many)
    items[:] = [item for item in items if item not in set(many)]
    for item in items:
        compiles = {"simt_library", "cpu_library", "isa"} & set(item.fixturenames) or "/csrc/" in str(item.path)
        simt_run = hasattr(item, "callspec") and item.callspec.params.get("device") == "simt"
        if not (compiles or simt_run or item.get_closest_marker("slow")):
            item.add_marker(pytest.mark.quick)


def many_rows_on_simt(device=None, rows=0, **parameters):
    return device == "simt" and rows > 100


def once(tmp_path_factory, name, build):
    """build(folder), in a folder that the processes of pytest-xdist share, by one of them after the other: ninja builds once."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(base / name)


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    return once(tmp_path_factory, "simt", simt.kernels)


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory):
    """What runs in the tests of "cpu" with KLFLOW_CPU_SANITIZE=1."""
    isa = build_info()["cpu_capability"]
    return once(tmp_path_factory, f"cpu-{isa}", lambda folder: simt.sanitized_cpu_kernels(folder, isa))


@pytest.fixture(params=BACKENDS)
def device(request):
    stand_in = {"simt": "simt_library"}
    if os.environ.get("KLFLOW_CPU_SANITIZE") == "1":
        stand_in["cpu"] = "cpu_library"
    if request.param not in stand_in:
        yield torch.device(request.param)
        return
    _C.use_backend(str(request.getfixturevalue(stand_in[request.param])))
    try:
        yield torch.device("cpu")
    finally:
        _C.use_backend(None)


@pytest.fixture
def data_folder():
    """The folder of real texts and the judge model, named by KLFLOW_DATA; never part of the package."""
    folder = os.environ.get("KLFLOW_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KLFLOW_DATA names no folder with the test data")
    return Path(folder)


@pytest.fixture
def klflow(monkeypatch, capsys, tmp_path):
    """klflow(*arguments): the command line in this process, in tmp_path; what it returned and printed."""
    from klflow_ext import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["klflow", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        message = code if isinstance(code, str) else ""
        return SimpleNamespace(returncode=int(bool(code)), stdout=printed.out, stderr=printed.err + message)

    return run


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """The folder of a tiny model in the place of the one that comes with the package."""
    from klflow_ext import Denoiser, DenoiserConfig, LogitPath, data, run
    from klflow_ext.cli import evaluate
    from klflow_ext.hub import save_pretrained

    tokenizer = data.train_tokenizer(["Once upon a time there was a cat."] * 3, 280)
    path = LogitPath(data.vocab_size_of(tokenizer))
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 32), path)
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(tmp_path / "stories", model, path, tokenizer, dtype=torch.bfloat16)
    for module in (run, evaluate):
        monkeypatch.setattr(module, "STORIES", tmp_path / "stories")
    return tmp_path / "stories"
