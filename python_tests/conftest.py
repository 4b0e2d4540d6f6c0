import os
from pathlib import Path

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def data_folder():
    """The folder of real texts and the judge model, named by KLFLOW_DATA; never part of the package."""
    folder = os.environ.get("KLFLOW_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KLFLOW_DATA names no folder with the test data")
    return Path(folder)
