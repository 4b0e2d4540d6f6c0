"""Checks of numbers, flags and choices. Every message reads "<name>: got <value>, allowed is <what>"."""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

LEAST, MOST = 1e-30, 1e30  # of scalars that the kernels divide by or multiply with in float32


def fail(error: type[Exception], name: str, value: object, allowed: object) -> NoReturn:
    raise error(f"{name}: got {value}, allowed is {allowed}")


def is_bool(value: object) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, bool)


def check_scalar(
    name: str, value: Any, low: float, high: float, allowed: str, open_low: bool = False, open_high: bool = False
) -> Any:
    """The number as a float; of Python, numpy, or a tensor of one. A symbolic one of torch.compile stays what it is."""
    if not isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        single = isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0
        if isinstance(value, bool) or not (single or isinstance(value, numbers.Real)) or is_bool(value):
            fail(TypeError, name, repr(value), allowed)
        try:
            value = float(value)
        except (TypeError, RuntimeError):  # a complex one, or what a numpy array of objects holds
            fail(TypeError, name, repr(value), allowed)
        except OverflowError:
            fail(ValueError, name, value, allowed)
    if not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
        fail(ValueError, name, value, allowed)
    return value


def check_int(name: str, value: Any, low: int, high: int, allowed: str, wrong_type: type[Exception] = TypeError) -> Any:
    """The number as an int; of Python, numpy, or a tensor of one. A symbolic one of torch.compile stays what it is."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            whole = None if is_bool(value) else operator.index(value)
        except TypeError:
            whole = None
        if whole is None:
            fail(wrong_type, name, repr(value), allowed)
        value = whole
    if value < low or value > high:
        fail(ValueError, name, value, allowed)
    return value


def check_field(name: str, value: Any, least: int, allowed: str | None = None) -> None:
    """An integer of a config, at least `least`; a ValueError where it is none, too."""
    check_int(name, value, least, 2**63 - 1, allowed or f"an integer >= {least}", ValueError)


def check_device(device: torch.device) -> None:
    """ValueError where the kernels cannot run on a device: none were compiled for it."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        fail(ValueError, "device", device, "cpu or cuda, on which the kernels run")
    from klflow_ext import build_info  # which imports this file

    info = build_info()
    if not info["cuda"]:
        fail(ValueError, "device", device, f"cpu: klflow_ext has no CUDA kernels ({info['cuda_reason']})")
    if not torch.cuda.is_available():
        fail(ValueError, "device", device, "cpu: torch sees no GPU")
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(info["cuda_arch"], major, minor):
        fail(
            ValueError,
            "device",
            f"{device}, a {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}",
            f"one of {info['cuda_arch']}, for which klflow_ext was compiled: install it with "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor} (8.0 or newer), or use cpu",
        )


def runs_on(arches: str, major: int, minor: int) -> bool:
    """Whether code for "sm_80,sm_90a,sm_120+PTX" runs on a device: compiled for the same major version and no later minor one, or
    PTX of no later version. An "a" is for that version alone."""
    for name in filter(None, arches.split(",")):
        found = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)(\+PTX)?", name)
        if found is None:
            continue
        built, here = (int(found[1]), int(found[2])), (major, minor)
        if built == here or (not found[3] and built <= here and (built[0] == major or found[4])):
            return True
    return False


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        fail(ValueError, name, repr(value), f"one of {tuple(choices)}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(ValueError, name, repr(value), "True or False")
