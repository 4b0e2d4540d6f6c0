"""Folders as the Hub keeps them, offline: saved, loaded, sent, with a card; run folders too."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from klflow_ext import (
    Denoiser,
    DenoiserConfig,
    LogitPath,
    Sampler,
    TrainConfig,
    Trainer,
    TransformerDenoiser,
    data,
    load_run,
    run,
)
from klflow_ext.hub import from_pretrained, push_to_hub, save_pretrained

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


def tokenizer():
    return data.train_tokenizer(["some text to read and write"], 260)


def bert(tokens):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=data.vocab_size_of(tokens) + 4, max_position_embeddings=32, **shape)
    return TransformerDenoiser(transformers.BertForMaskedLM(config), tokenizer=tokens).eval()


def denoiser(path):
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 16), path)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def same(model, other):
    path = LogitPath(model.path.vocab_size)
    x, t = path.sample(torch.randint(path.vocab_size, (2, 6)), 0.2, 0), torch.full((2,), 0.2)
    with torch.no_grad():
        return torch.equal(model(x, t), other(x, t))


def test_an_adapted_transformer(tmp_path):
    model = bert(tokenizer())
    assert model.path.vocab_size == data.vocab_size_of(model.tokenizer) < model.head.out_features
    model.save_pretrained(tmp_path / "mine", data="a line of text")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md",
    }  # fmt: skip
    again = TransformerDenoiser.from_pretrained(tmp_path / "mine")
    assert same(model, again) and not again.training and again.path.to_dict() == model.path.to_dict()
    assert again.tokenizer.encode("some text").ids == model.tokenizer.encode("some text").ids
    assert again.head.weight is again.transformer.get_input_embeddings().weight
    assert Sampler(again, again.path).sample((1, 5), steps=2).tokens.max() < model.path.vocab_size
    loaded, path, tokens = from_pretrained(tmp_path / "mine")
    assert same(loaded, model) and path.vocab_size == model.path.vocab_size and tokens is not None


def test_the_card(tmp_path):
    """What is known; nothing of this machine; the licence is left to the user; one that is there stays."""
    model = bert(tokenizer())
    model.transformer.config._name_or_path = "someone/some-bert"
    model.save_pretrained(tmp_path / "mine", data="a line of text", name="me/mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: klflow_ext\n") and "base_model: someone/some-bert\n" in card
    assert "Data: a line of text" in card and "to be filled in" in card and 'from_pretrained("me/mine")' in card
    assert str(tmp_path) not in card and "\nlicense:" not in card
    assert huggingface_hub.ModelCard(card).data.to_dict()["tags"] == ["flow-matching", "simplex"]
    (tmp_path / "mine" / "README.md").write_text("my own")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    model.transformer.config._name_or_path = str(tmp_path)
    save_pretrained(tmp_path / "other", denoiser(LogitPath(30)), LogitPath(30))
    model.save_pretrained(tmp_path / "third")
    for name in ("other", "third"):
        text = (tmp_path / name / "README.md").read_text()
        assert "base_model" not in text and "Data: *not stated*" in text and str(tmp_path) not in text


def test_a_denoiser_and_a_run_folder(tmp_path):
    path = LogitPath(30)
    model = denoiser(path)
    save_pretrained(tmp_path / "saved", model, path)
    trainer = Trainer(
        model, path, np.arange(500) * 7 % 30, TrainConfig(steps=1, batch_size=2, length=8), tmp_path / "run"
    )
    trainer.save()
    for name in ("saved", "run"):
        again, its_path, tokens = from_pretrained(str(tmp_path / name))
        assert same(model.eval(), again) and its_path.to_dict() == path.to_dict() and tokens is None
    with pytest.raises(ValueError, match="with a Denoiser, allowed is a TransformerDenoiser"):
        TransformerDenoiser.from_pretrained(tmp_path / "run")


def test_half_the_bytes(tmp_path):
    """Weights of bfloat16 in the file are float32 again in the model, and near what they were."""
    path = LogitPath(30)
    model = denoiser(path)
    for name, dtype in (("full", None), ("half", torch.bfloat16)):
        save_pretrained(tmp_path / name, model, path, dtype=dtype)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]  # the header is of one size
    again = from_pretrained(tmp_path / "half")[0]
    for name, value in model.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == value.dtype
        torch.testing.assert_close(found, value, rtol=2**-8, atol=0)
    with pytest.raises(ValueError, match="^dtype: got torch.int8, allowed is None or a floating one"):
        save_pretrained(tmp_path / "no", model, path, dtype=torch.int8)


def test_load_run_reads_a_saved_folder(tmp_path, monkeypatch):
    """Also as the model of the package, by no name at all."""
    tokens = tokenizer()
    path = LogitPath(data.vocab_size_of(tokens))
    model = denoiser(path)
    save_pretrained(tmp_path / "stories", model, path, tokens)
    monkeypatch.setattr(run, "STORIES", tmp_path / "stories")
    for folder in ((str(tmp_path / "stories"),), ()):
        again, its_path, its_tokens = load_run(*folder)
        assert same(model, again) and its_path.to_dict() == path.to_dict() and not again.training
        assert its_tokens.to_str() == tokens.to_str()
    monkeypatch.setattr(run, "STORIES", tmp_path / "none")
    with pytest.raises(ValueError, match="^run: got none, and this klflow_ext came without a model .*: name a run"):
        load_run()
    config = json.loads((tmp_path / "stories" / "config.json").read_text())
    (tmp_path / "stories" / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="has format 99, allowed is"):
        load_run(tmp_path / "stories")


def test_a_run_keeps_its_tokenizer(tmp_path):
    """So that the commands sample from it, and a folder for the Hub is made of it."""
    model = bert(tokenizer())
    stream = np.array(model.tokenizer.encode("some text to read and write. " * 30).ids)
    config = TrainConfig(steps=2, batch_size=2, length=8)
    trainer = Trainer(model, model.path, stream, config, tmp_path / "run", model.tokenizer)
    trainer.fit(progress=False)
    again = TransformerDenoiser.from_pretrained(tmp_path / "run")
    assert same(model.eval(), again) and again.tokenizer.to_str() == model.tokenizer.to_str()
    other = Trainer(model, model.path, stream, config, tmp_path / "run")  # goes on without it
    other.load()
    other.save()
    assert load_run(tmp_path / "run")[2].to_str() == model.tokenizer.to_str()


def test_pushed(monkeypatch):
    """Nothing is sent in a test: a stand-in for the Hub says what it got."""
    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent["repo"] = (repo_id, private, exist_ok)

        def file_exists(self, repo_id, name):
            return sent.get("card", False)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = sorted(file.name for file in Path(folder_path).iterdir())
            return "where"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert bert(tokenizer()).push_to_hub("me/mine", private=True, token="a token") == "where"
    assert sent["repo"] == ("me/mine", True, True) and sent["token"] == "a token"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    sent["card"] = True
    push_to_hub("me/mine", denoiser(LogitPath(30)), LogitPath(30), data="words")
    assert sent["files"] == ["config.json", "model.safetensors"]


def test_fetched(tmp_path, monkeypatch):
    path = LogitPath(30)
    model = denoiser(path)
    save_pretrained(tmp_path / "saved", model, path)
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        if name == "me/none":
            raise OSError("no such repository\nmore")
        return str(tmp_path / "saved")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert same(model, from_pretrained("me/mine", revision="v1")[0])
    assert asked == [("me/mine", "v1", ["config.json", "model.safetensors", "tokenizer.json"])]
    with pytest.raises(ValueError, match="^name: 'me/none' cannot be fetched: no such repository$"):
        from_pretrained("me/none")


def test_what_is_refused(tmp_path):
    path = LogitPath(30)
    model = denoiser(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for call, message in (
        (lambda: from_pretrained(tmp_path / "none"), "name: got .*none', allowed is a folder that is there"),
        (lambda: from_pretrained(tmp_path / "empty"), "name: got .*empty', which has no config.json"),
        (lambda: from_pretrained(tmp_path / "bert"), "name: got .* of library None.*TransformerDenoiser adapts"),
        (lambda: save_pretrained(tmp_path / "x", model, LogitPath(31)), "head: got 30 outputs, allowed is V = 31"),
        (lambda: save_pretrained(tmp_path / "bert/config.json/x", model, path), "folder: .* cannot be written"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="^head.weight: got numbers that are not finite"):
        save_pretrained(tmp_path / "y", model, path)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_file_that_is_broken(tmp_path):
    path = LogitPath(30)
    save_pretrained(tmp_path, denoiser(path), path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["n_embd"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.safetensors cannot be read: it holds"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        from_pretrained(tmp_path)
