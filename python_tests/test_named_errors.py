"""What a user gets wrong first: another V, a field out of range, another type, a GPU that nothing was compiled for. All of it is named."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from klflow_ext import (
    Autoregressive,
    Batches,
    Denoiser,
    DenoiserConfig,
    LinearPath,
    LogitPath,
    MaskPath,
    Objective,
    Sampler,
    SpherePath,
    TrainConfig,
    Trainer,
    UniformPath,
    load_run,
)  # fmt: skip
from klflow_ext.checks import check_device, runs_on
from klflow_ext.cli.about import _gpu
from klflow_ext.cli.terminal import choose_device
from klflow_ext.evaluate import loss_by_time
from klflow_ext.hub import save_pretrained
from klflow_ext.path import as_network

V = 20
STREAM = np.arange(400) % V
CONFIG = TrainConfig(steps=1, length=8, batch_size=2)
TEXT = torch.zeros(2, 8, dtype=torch.int64)
PLACES = {  # where a model meets a path
    "Trainer": lambda model, path: Trainer(model, path, STREAM, CONFIG).train_step(),
    "Sampler": lambda model, path: Sampler(model, path).sample((2, 8), steps=2),
    "likelihood": lambda model, path: Sampler(model, path).likelihood(TEXT, steps=2),
    "bound": lambda model, path: path.likelihood(model, TEXT, strata=1),
    "an own loop": lambda model, path: Batches.of(STREAM, path, CONFIG, model).batch(0).loss(path, model),
    "Objective": lambda model, path: Objective(model, path)(TEXT, torch.zeros(2), 0),
    "loss_by_time": lambda model, path: loss_by_time(model, path, TEXT),
    "save_pretrained": lambda model, path: save_pretrained("/dev/null/run", model, path),
}


class Plain(torch.nn.Module):
    def __init__(self, path, outputs):
        super().__init__()
        rows = path.reads == "rows"
        self.layer = torch.nn.Linear(V, outputs) if rows else torch.nn.Embedding(V + 1, outputs)

    def forward(self, x, t):
        return self.layer(x)


def denoiser(vocab_size, n_layer=1):
    return Denoiser(DenoiserConfig(vocab_size, n_layer, 1, 8, 16), LogitPath(vocab_size))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "save_pretrained"])  # which asks for no logits
@pytest.mark.parametrize("outputs", [V - 3, V + 3])
def test_logits_that_are_not_v_wide(place, outputs):
    for path in (LogitPath(V), MaskPath(V), Autoregressive(V)):
        with pytest.raises(
            ValueError, match=rf"^model: got logits of shape \(2, \d, {outputs}\), allowed is .* {V}\)$"
        ):
            PLACES[place](Plain(path, outputs), path)
    with pytest.raises(ValueError, match=f"^head: got {outputs} outputs, allowed is V = {V}$"):
        PLACES[place](denoiser(outputs), LogitPath(V))


@pytest.mark.parametrize("place", PLACES)
def test_a_network_that_was_made_for_another_path(place):
    others = ((LogitPath(V), LogitPath(V, alpha=0.5)), (LogitPath(V), LinearPath(V)), (MaskPath(V), UniformPath(V)))
    for made, path in (
        (LogitPath(V), LogitPath(V, beta=0.02)),
        *others[: 3 * (place != "bound")],
    ):  # others have no bound
        reads = "tokens" if made.reads == "tokens" else "posterior"
        model = Denoiser(DenoiserConfig(V, 1, 1, 8, 16, input=reads), made)
        for given in (model, torch.compile(model)):
            with pytest.raises(ValueError) as error:
                PLACES[place](given, path)
            assert str(error.value) == f"path: got {path!r}, allowed is that for which the model was made, {made!r}"


def test_a_network_on_its_path_with_other_ends(tmp_path):
    model, path = denoiser(V), LogitPath(V, t_max=0.4, t_split=0.3)
    assert path.t_max != model.path.t_max and path.t_split != model.path.t_split
    for name in PLACES.keys() - {"save_pretrained"}:
        PLACES[name](model, path)
    save_pretrained(tmp_path, model, path)
    assert load_run(tmp_path)[1].to_dict() == path.to_dict()


def test_a_denoiser_and_a_path_of_another_v():
    with pytest.raises(ValueError, match="^path: its vocab_size is 20, allowed is that of config, 22"):
        Denoiser(DenoiserConfig(V + 2, 1, 1, 8, 16), LogitPath(V))


def test_what_does_not_fit_a_run(tmp_path):
    Trainer(denoiser(V), LogitPath(V), STREAM, CONFIG, tmp_path).save()
    for model, error, message in (
        (denoiser(V + 1), ValueError, "^head: got 21 outputs, allowed is V = 20"),
        (
            Denoiser(DenoiserConfig(V, 1, 1, 8, 16), LogitPath(V, beta=0.02)),
            ValueError,
            "^path: got LogitPath.*beta=0.01.*, allowed is that for which the model was made, LogitPath.*beta=0.02",
        ),
        (
            Plain(LogitPath(V), V),
            ValueError,
            "model.safetensors cannot be read: it holds blocks.0.* the model has None",
        ),
        (denoiser(V, 2), ValueError, "model.safetensors cannot be read: it holds blocks.1"),
        (3, TypeError, "^model: got a int, allowed where it takes up weights is a torch.nn.Module"),
    ):
        with pytest.raises(error, match=message):
            load_run(tmp_path, model=model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: Sampler(3, p), "^model: got a int, allowed is a Network or any model"),
        (lambda m, p: as_network(None, p), "^model: got a NoneType, allowed is a Network or any model"),
        (lambda m, p: as_network(m, V), "^path: got a int, allowed is a Path, such as"),
        (lambda m, p: save_pretrained("/dev/null/run", m, V), "^path: got a int, allowed is a Path, such as"),
        (lambda m, p: Sampler(m, "logit"), "^path: got a str, allowed is a Path, such as"),
        (lambda m, p: Trainer(m, V, STREAM, CONFIG), "^path: got a int, allowed is a Path"),
        (lambda m, p: Batches.of(STREAM, None, CONFIG, m), "^path: got a NoneType, allowed is a Path"),
        (lambda m, p: Trainer(m, p, STREAM, {"steps": 3}), "^config: got a dict, allowed is a TrainConfig"),
        (lambda m, p: Trainer(m, p, STREAM / 2, CONFIG), "^stream: got float64 of shape .*, allowed is a row of integers"),
        (lambda m, p: Trainer(m, p, np.append(STREAM, 1169), CONFIG), f"^stream: got 1169 at place 400, allowed is 0 to V - 1 = {V - 1}"),
        (lambda m, p: Batches.of(np.append(-1, STREAM), p, CONFIG, m), f"^stream: got -1 at place 0, allowed is 0 to V - 1 = {V - 1}"),
        (lambda m, p: Trainer(m, p, STREAM.reshape(2, -1), CONFIG), r"^stream: got int64 of shape \(2, 200\), allowed"),
    ],
)  # fmt: skip
def test_other_types(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(denoiser(V), LogitPath(V))


BAD = (-1, math.nan, "x", [], object(), 10**30)
NO_LIMIT = {"lr", "clip", "checkpoint_seconds", "max_seconds", "weight_decay"}  # of which 10^30 is allowed


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_every_setting_of_training_has_its_range(name):
    for value in BAD[: -1 if name in NO_LIMIT else None]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*, allowed is"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "n_layer", "n_head", "n_embd", "max_length", "top"])
def test_every_number_of_a_shape_has_its_range(name):
    for value in (0, 1.5, True, *BAD):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*, allowed is"):
            DenoiserConfig(**{"vocab_size": V, name: value})


@pytest.mark.parametrize("kind", [LogitPath, LinearPath, SpherePath, MaskPath, UniformPath, Autoregressive])
def test_every_setting_of_a_path_has_its_range(kind):
    for name in kind.fields:
        for value in BAD:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: got .*, allowed is"):
                kind(**{"vocab_size": V, name: value})


@pytest.mark.parametrize(
    ("arches", "runs", "does_not"),
    [
        ("sm_80,sm_90,sm_120+PTX", ["8.0", "8.6", "9.0", "12.0", "12.1", "13.0"], ["7.5", "10.0", "11.0"]),
        ("sm_86", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("sm_90a+PTX", ["9.0"], ["9.1", "10.0"]),
        ("sm_80+PTX", ["8.0", "9.0", "12.0"], ["7.5"]),
        ("", [], ["9.0"]),
    ],
)
def test_for_which_gpus_there_is_code(arches, runs, does_not):
    for version in runs + does_not:
        assert runs_on(arches, *map(int, version.split("."))) == (version in runs), version


def test_a_gpu_that_nothing_was_compiled_for(monkeypatch, capsys):
    """Asked for, it is refused by name; not asked for, the CPU is used, with a word. A GPU with kernels is used."""
    model = denoiser(V)
    built = {"cuda": True, "cuda_arch": "sm_80,sm_90", "cuda_reason": ""}
    monkeypatch.setattr("klflow_ext.build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    said = "device: got cuda, a Old GPU of compute capability 7.5, allowed is one of sm_80,sm_90, for which klflow_ext was compiled"
    for refuses in (
        choose_device,
        lambda name: Sampler(model, LogitPath(V), name),
        lambda name: check_device(torch.device(name)),
    ):
        with pytest.raises(ValueError, match=f"^{said}: install it with TORCH_CUDA_ARCH_LIST=7.5"):
            refuses("cuda")
    assert (
        choose_device(None) == torch.device("cpu")
        and f"the CPU is used, not the GPU: {said}" in capsys.readouterr().err
    )
    assert _gpu().startswith(f"Old GPU, which is not used: {said}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _gpu() == "Old GPU"
    assert choose_device(None) == torch.device("cuda") and not capsys.readouterr().err
    built |= {"cuda": False, "cuda_reason": "no nvcc was found at build time"}
    with pytest.raises(
        ValueError, match="^device: got cuda, allowed is cpu: klflow_ext has no CUDA kernels .no nvcc was"
    ):
        choose_device("cuda")
    assert choose_device(None) == torch.device("cpu") and "no nvcc was found" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu") and not capsys.readouterr().err
    with pytest.raises(ValueError, match="^device: got meta, allowed is cpu or cuda, on which the kernels run"):
        Sampler(model, LogitPath(V), "meta")
