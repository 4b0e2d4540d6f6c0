import os
from pathlib import Path

import pytest
import simt
import torch

from klflow_ext import _C, build_info

# "simt" runs the CUDA kernels on CPU tensors, compiled as host code against csrc/simt.
BACKENDS = ["cpu", "simt"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(scope="session")
def simt_library(tmp_path_factory):
    return simt.kernels(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory):
    """What runs in the tests of "cpu" with KLFLOW_CPU_SANITIZE=1."""
    return simt.sanitized_cpu_kernels(tmp_path_factory.mktemp("cpu"), build_info()["cpu_capability"])


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
