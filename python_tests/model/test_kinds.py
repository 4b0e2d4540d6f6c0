"""Runs of networks that are no Denoiser: saved, loaded, gone on with; and what cannot be made again."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from own_networks import Plain, Silent, Tied

from klflow_ext import LogitPath, Run, TrainConfig, Trainer, load_run
from klflow_ext.model import describe, remake

V = 20
STREAM = np.arange(500) * 3 % V
CONFIG = TrainConfig(steps=6, batch_size=4, length=8, ema=0.5)


def train(kind, folder, steps=3):
    torch.manual_seed(0)
    path = LogitPath(V)
    trainer = Trainer(kind(path), path, STREAM, CONFIG, folder)
    for _ in range(steps):
        trainer.train_step()
    trainer.save()
    return trainer


@pytest.mark.parametrize("kind", [Tied, Silent, Plain])
def test_a_run_of_any_model(kind, tmp_path):
    """The averaged weights, of tied ones too, and the training that goes on bit for bit."""
    trainer = train(kind, tmp_path)
    path = LogitPath(V)
    own = None if kind is Tied else kind(path)
    model, loaded_path, tokenizer = load_run(tmp_path, model=own)
    assert tokenizer is None and loaded_path.to_dict() == path.to_dict() and not model.training
    assert type(model) is kind and (own is None or model is own)
    averaged = trainer.averaged_model()
    for name, value in averaged.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True))
    if kind is not Plain:
        assert model.head.weight is model.embedding.weight and averaged.head.weight is averaged.embedding.weight
    again = Trainer(model.train(), path, STREAM, CONFIG, tmp_path)
    again.load()
    assert again.step == 3
    assert [again.train_step() for _ in range(3)] == [trainer.train_step() for _ in range(3)]
    for ours, its in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, its)


def test_config_says_how(tmp_path):
    train(Tied, tmp_path, 1)
    assert Run(tmp_path).config()["model"] == {"class": "own_networks:Tied", "settings": {"width": 16}}
    assert describe(Plain(LogitPath(V))) == {"class": "own_networks:Plain", "settings": None}


def test_what_cannot_be_made_again(tmp_path, monkeypatch):
    class Local(Tied):
        pass

    for kind, message in (
        (Silent, r"got a own_networks:Silent, whose to_dict says nothing.*load_run\(folder, model=...\)"),
        (Plain, "got a own_networks:Plain, whose to_dict says nothing"),
        (Local, "class test_kinds:test_what_cannot_be_made_again.<locals>.Local, which cannot be imported"),
    ):
        train(kind, tmp_path / kind.__name__, 1)
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path / kind.__name__)
    train(Tied, tmp_path / "tied", 1)
    monkeypatch.setitem(sys.modules, "own_networks", None)
    with pytest.raises(ValueError, match="model: got the class own_networks:Tied, which cannot be imported"):
        load_run(tmp_path / "tied")
    assert isinstance(load_run(tmp_path / "tied", model=Tied(LogitPath(V)))[0], Tied)


@pytest.mark.parametrize("name", ["pathlib:Path", "own_networks:Plain", "klflow_ext:load_run", "os:system", "", "a.b"])
def test_only_networks_are_made(name):
    with pytest.raises(ValueError, match=f"^model: got (the class )?{name}"):
        remake({"class": name, "settings": {}}, LogitPath(V))


def test_a_model_of_another_shape(tmp_path):
    train(Tied, tmp_path, 1)
    for model, message in (
        (Tied(LogitPath(V), width=8), r"it holds embedding.weight of \[20, 16\], the model has \[20, 8\]"),
        (Tied(LogitPath(V + 1)), f"head: got {V + 1} outputs, allowed is V = {V}"),
    ):
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path, model=model)


def test_recompute_is_refused_where_it_cannot_be():
    path = LogitPath(V)
    with pytest.raises(ValueError, match="recompute: got True, allowed is False"):
        Trainer(Tied(path), path, STREAM, replace(CONFIG, recompute=True))
