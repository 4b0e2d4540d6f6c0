"""Files that are torn, flipped, swapped or foreign: the right result, or a ValueError that names the file."""

import json
import os
import re
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from mutations import COUNT, mutation
from runs import V, contents, trainer

from klflow_ext import Run, TrainConfig, data, load_run
from klflow_ext.checkpoint import FORMAT, Checkpoint, _pack, _signed, _unpack, stamps

FILES = ("config.json", "model.safetensors", "training.safetensors", "manifest.json")
TEXTS = ("tokenizer.json", "train.npy", "heldout.npy")


def write_run(folder):
    folder.mkdir()
    run = trainer(3, folder, ema=0.5, time_sampling="learned", shape={"n_layer": 1, "n_embd": 16, "max_length": 16})
    data.train_tokenizer(["some text"], 257).save(str(folder / "tokenizer.json"))
    np.save(folder / "heldout.npy", run.stream[:100])
    run.fit(progress=False)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    write_run(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A run whose files a test may spoil."""
    for name, content in contents(whole).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def network(folder):
    model, path = Run(folder).model()
    settings = TrainConfig.of(Run(folder).last())
    return [path.to_dict(), settings, Run(folder).config(), *(x.numpy().tobytes() for x in model.state_dict().values())]


def training(folder):
    run = trainer(3, shape={"n_layer": 1, "n_embd": 16, "max_length": 16}, ema=0.5, time_sampling="learned")
    run.load(Run(folder).last())
    tensors = [*run.model.state_dict().values(), *run.average.values(), run.batches.curve.sums]
    tensors += [x for o in run.optimizers for s in o.state_dict()["state"].values() for x in s.values()]
    return [run.step, run.seconds, run.skipped, *(x.numpy().tobytes() for x in tensors)]


def texts(folder):
    return [Run(folder).tokenizer().to_str(), *(stream.tobytes() for stream in Run(folder).streams())]


def everything(folder):
    return network(folder) + training(folder) + texts(folder)


READS = {
    "config.json": network, "model.safetensors": network, "training.safetensors": training, "manifest.json": everything,
    "tokenizer.json": texts, "train.npy": texts, "heldout.npy": texts,
}  # fmt: skip


def sign(folder):
    """Makes a manifest that fits the files as they are: what a foreign folder has, or one made to harm."""
    checkpoint = Run(folder).last().folder
    manifest = {"format": FORMAT, "step": 3, "files": stamps(checkpoint, FILES[:3]), "texts": stamps(folder, TEXTS)}
    (checkpoint / "manifest.json").write_text(_signed(manifest))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", [*FILES, *TEXTS])
def test_mutations(folder, name, signed):
    """Signed: the checksums fit, so that nothing but the reading itself is between a file and what is made of it."""
    if signed and name == "manifest.json":
        pytest.skip("a manifest of other files is their mutation")
    read = READS[name]
    right, checkpoint = read(folder), Run(folder).last().folder
    path = (folder if name in TEXTS else checkpoint) / name
    content, generator = path.read_bytes(), np.random.default_rng(len(name))
    others = [c for other, c in contents(folder).items() if other != str(path.relative_to(folder))]
    seen = {"refused": 0, "right": 0, "other": 0}
    for _ in range(COUNT):
        spoiled = mutation(name, content, others, generator)
        path.write_bytes(spoiled)
        if signed:
            sign(folder)
        begin = time.process_time()
        try:
            found = read(folder)
        except ValueError as error:
            assert name in str(error) and len(str(error)) < 2000, error
            seen["refused"] += 1
        else:
            seen["right" if found == right else "other"] += 1
            assert signed or found == right
        assert time.process_time() - begin < 1
    assert seen["refused"] > 0.4 * COUNT or signed
    assert signed or seen["other"] == 0
    print(name, seen)


def test_training_falls_back_to_the_last_good_one(folder):
    run = trainer(
        8, folder, keep=3, shape={"n_layer": 1, "n_embd": 16, "max_length": 16}, ema=0.5, time_sampling="learned"
    )
    run.load()
    for _ in range(2):
        run.train_step()
        run.save()
    first, *later = reversed(Run(folder).checkpoints())
    assert (first.step, [c.step for c in later]) == (3, [4, 5])
    (later[1].folder / "training.safetensors").write_bytes(b"torn")
    (later[0].folder / "manifest.json").unlink()
    said = []
    assert Run(folder).last_good(said.append).folder == first.folder
    assert len(said) == 2 and re.search(
        r"step-5/training.safetensors cannot be read: it has 4 bytes, \d+ were", said[0]
    )
    assert said[1].endswith("it has no manifest.json; going back to checkpoint-0001-step-3")
    with pytest.warns(UserWarning, match="going back to checkpoint-0001-step-3"):
        run.load()
    assert run.step == 3
    with pytest.raises(ValueError, match="step-5/training.safetensors cannot be read"):
        Run(folder).last().check()
    run.train_step()
    run.config = TrainConfig(keep=1)
    run.save()
    (last,) = Run(folder).checkpoints()
    assert (last.number, last.step) == (4, 4)
    (last.folder / "config.json").unlink()
    with pytest.raises(ValueError, match="it has no config.json; no checkpoint of .* is whole"):
        run.load()


def test_another_format_is_named_and_nothing_falls_back(folder):
    last = Run(folder).last().folder
    manifest = {**json.loads((last / "manifest.json").read_text()), "format": FORMAT + 1}
    newer = folder / "checkpoint-0009-step-9"
    newer.mkdir()
    manifest.pop("checksum")
    (newer / "manifest.json").write_text(_signed(manifest))
    for read in (load_run, lambda f: Run(f).last_good(), lambda f: Run(f).streams()):
        with pytest.raises(ValueError, match=f"0009-step-9/manifest.json has format {FORMAT + 1}, allowed is {FORMAT}"):
            read(folder)


@pytest.mark.parametrize(
    "field,value",
    [
        ("vocab_size", 10**9), ("n_layer", 10**9), ("n_layer", 4000), ("n_embd", 2**17), ("max_length", 10**12), ("n_head", 8),
        ("time", "adaln"), ("self_conditioning", True), ("slices", "yes"), ("color", "red"),
    ],
)  # fmt: skip
def test_a_config_that_lies_takes_no_memory(folder, field, value):
    path = Run(folder).last().folder / "config.json"
    config = json.loads(path.read_text())
    config["model"][field] = value
    if field == "vocab_size":
        config["path"][field] = value
    path.write_text(json.dumps(config))
    sign(folder)
    if field == "n_head":  # fits the weights
        load_run(folder)
        return
    with pytest.raises(ValueError, match="config.json"):
        load_run(folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_pickle_is_read(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    last = Run(folder).last().folder
    for path in (last / "training.safetensors", last / "model.safetensors", folder / "train.npy"):
        before = path.read_bytes()
        if path.suffix == ".npy":
            np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
        else:
            torch.save({"x": Evil()}, path)
        sign(folder)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            everything(folder)
        path.write_bytes(before)
    assert os.listdir() == []


def test_moments_of_another_shape(folder):
    run = trainer(3, shape={"n_layer": 1, "n_embd": 16, "max_length": 16})
    with Run(folder).last().training() as state:
        state["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(V, 1)
    tensors = {}
    tree = json.dumps(_pack(state, "", tensors))
    safetensors.torch.save_file(tensors, Run(folder).last().folder / "training.safetensors", {"tree": tree})
    sign(folder)
    with pytest.raises(ValueError, match=r"training.safetensors cannot be read: its exp_avg 0 has shape \(40, 1\)"):
        run.load(Run(folder).last())


def test_what_is_packed_comes_back():
    tree = {"a": [1, 2.5, None, True, "x", {3: torch.arange(3), "b": {}}], "c": {"d": torch.tensor(2.0)}, "e": []}
    tensors = {}
    back = _unpack(json.loads(json.dumps(_pack(tree, "", tensors))), tensors.__getitem__)
    assert list(tensors) == ["a/5/3", "c/d"]
    assert back["a"][:5] == tree["a"][:5] and torch.equal(back["a"][5][3], torch.arange(3)) and back["e"] == []
    assert back["c"]["d"] == 2


def test_names_of_folders(tmp_path):
    for name in (
        "checkpoint-1",
        "checkpoint-0001-step-5.tmp",
        "checkpoint-x-step-5",
        "checkpoint-" + "9" * 30 + "-step-1",
    ):
        with pytest.raises(ValueError, match="allowed is checkpoint-<number>-step-<step>"):
            Checkpoint(tmp_path / name)
        (tmp_path / name).mkdir()
    assert Run(tmp_path).checkpoints() == []
    with pytest.raises(ValueError, match="is no run folder: it has no checkpoint"):
        Run(tmp_path).config()
    (tmp_path / "config.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=f"has format 1, allowed is {FORMAT}: train it again with this version"):
        Run(tmp_path).config()
