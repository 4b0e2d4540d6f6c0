"""What was built, what runs here, and why something does not. Needs no extra."""

from __future__ import annotations

import torch

from klflow_ext import __version__, build_info
from klflow_ext.checks import check_device


def print_info() -> None:
    info = build_info()
    print(f"klflow_ext       {__version__}, built against torch {info['torch_headers']} with g++ {info['compiler']}")
    print(f"torch            {torch.__version__} (any torch >= {info['torch_minimum']} will do)")
    built = f"{info['cuda_arch']} (nvcc {info['nvcc']})" if info["cuda"] else f"none: {info['cuda_reason']}"
    print(f"CUDA kernels     {built}")
    print(f"CUDA device      {_gpu()}")
    if info["cuda"]:
        print(f"torch's stream   {info['cuda_stream'] or 'not found: this torch has no CUDA'}")
    why = f" ({info['cpu_capability_reason']})" if info["cpu_capability_reason"] else ""
    print(f"CPU kernels      {info['cpu_capability']}{why}, {torch.get_num_threads()} threads")


def _gpu() -> str:
    """Its name, or why none is used."""
    if not torch.cuda.is_available():
        return "none seen by torch: every op runs on the CPU"
    try:
        check_device(torch.device("cuda"))
    except ValueError as error:
        return f"{torch.cuda.get_device_name()}, which is not used: {error}"
    return torch.cuda.get_device_name()
