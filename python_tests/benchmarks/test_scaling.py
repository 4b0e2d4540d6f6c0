"""What benchmarks/scaling.py predicts hangs together."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import scaling  # noqa: E402

from klflow_ext import Denoiser, DenoiserConfig, LogitPath  # noqa: E402

MACHINE = scaling.Machine()


@pytest.fixture(scope="module")
def model():
    return scaling.model_of("150m", 1000)


def test_parameters_are_counted(model):
    small = DenoiserConfig(64, n_layer=3, n_head=2, n_embd=32)
    whole = sum(p.numel() for p in Denoiser(small, LogitPath(64)).parameters())
    per_block = sum(p.numel() for p in Denoiser(replace(small, n_layer=1), LogitPath(64)).blocks.parameters())
    assert model.parameters == model.layers * model.block + model.root
    assert whole - 3 * per_block == 2 * 64 * 32 + 128 * 32 + 32 * 32
    assert model.block == 12 * 768**2 and model.root == 2 * 1000 * 768 + 128 * 768 + 768**2


def test_recomputing_keeps_the_input_of_a_block_alone(model):
    assert model.saved_recompute == pytest.approx(4 * 768, rel=0.05)  # a float32 row
    assert model.saved > 10 * model.saved_recompute


def test_bytes_and_seconds():
    assert scaling.gather_seconds(MACHINE, 1, 1, 1e9) == 0
    inside = scaling.gather_seconds(MACHINE, 8, 1, 1e9)
    assert inside == pytest.approx(7 / 8 * 1e9 / (0.8 * 450e9) + 5e-6)
    single = scaling.gather_seconds(MACHINE, 2, 2, 1e9)  # one GPU of each of two nodes: the network alone
    assert single == pytest.approx(0.5 * 1e9 / (0.8 * 50e9) + 1e-5)


def test_predictions(model):
    alone, ddp, fsdp = (
        scaling.predict(model, MACHINE, gpus, engine, 8, False)
        for gpus, engine in ((1, "ddp"), (64, "ddp"), (64, "fsdp"))
    )
    assert alone["exposed"] == alone["sent"] == 0 and 0.1 < alone["mfu"] < MACHINE.utilisation
    assert ddp["step"] > alone["step"] and ddp["memory"] == alone["memory"] > fsdp["memory"]
    assert ddp["tokens"] < 64 * alone["tokens"] and ddp["tokens"] > 32 * alone["tokens"]
    again = scaling.predict(model, MACHINE, 64, "fsdp", 8, True)
    assert again["memory"] < fsdp["memory"] and again["step"] > fsdp["step"]
    small = replace(MACHINE, memory=alone["memory"] - 1)
    assert alone["fits"] and not scaling.predict(model, small, 1, "ddp", 8, False)["fits"]
