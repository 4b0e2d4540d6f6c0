"""Judges: how likely a text is to an independent model."""

import math

import numpy as np
import pytest
import torch

from klflow_ext import Autoregressive, Denoiser, DenoiserConfig, MaskPath, data
from klflow_ext.evaluate.judge import Judge, RunJudge, TransformersJudge, open_judge
from klflow_ext.hub import save_pretrained

TEXTS = ["Once upon a time there was a cat.", "The dog sat. " * 9, ""]


def stories(data_folder, count):
    text = (data_folder / "tinystories" / "tinystories_heldout.txt").read_text()
    return text.split(f"\n{data.END}\n")[:count]


def shuffled(texts):
    generator = np.random.default_rng(0)
    return [" ".join(generator.permutation(text.split())) for text in texts]


def test_judge_tells_stories_from_shuffled_words(data_folder):
    """Held-out stories cost 1.32 nats for each of its tokens, .91 bits for each byte; their words in random order 3.08."""
    judge = open_judge(data_folder / "stories260K")
    real = stories(data_folder, 30)
    bits, sizes = zip(*judge.bits(real), strict=True)
    tokens = sum(min(len(judge.encode(text)), judge.context) - 1 for text in real)
    assert sum(bits) / sum(sizes) == pytest.approx(0.91, abs=0.03)
    assert sum(bits) * math.log(2) / tokens == pytest.approx(1.32, abs=0.04)
    assert judge.bits_per_byte(shuffled(real)) == pytest.approx(3.08, abs=0.06)


def test_words_are_merged_as_in_the_whole_text(data_folder):
    judge = Judge(data_folder / "stories260K")
    assert judge.by_words
    for text in [*stories(data_folder, 2), "  a  b é\n\n c🐍 ", "", " "]:
        assert judge.encode(text) == [1, *judge._merged(" " + text)]
    judge.by_words, found = False, judge.encode("Once upon a time")
    assert judge.encode("Once upon a time") == found


def saved_run(folder, path=Autoregressive, **options):
    tokenizer = data.train_tokenizer(["Once upon a time there was a cat."] * 3, 280)
    path = path(data.vocab_size_of(tokenizer))
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(path.vocab_size, 1, 2, 16, 24, time="none", input="tokens", **options), path)
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(folder, model, path, tokenizer)
    return model.eval(), path, tokenizer


def test_an_autoregressive_model_of_the_package(tmp_path):
    model, path, tokenizer = saved_run(tmp_path, causal=True)
    judge = open_judge(tmp_path)
    assert isinstance(judge, RunJudge) and judge.context == 25
    looks = judge.look(TEXTS)
    for text, look in zip(TEXTS[:2], looks, strict=False):
        ids = tokenizer.encode(text).ids
        wanted = path.likelihood(model, torch.tensor([ids[:24]])).nats.item() / math.log(2)
        assert look.bits == pytest.approx(wanted, rel=1e-5)
        assert look.size == pytest.approx(len(text) * min(1, 25 / (len(ids) + 1)))
    assert looks[2][:2] == (0, 0) and not looks[2].feature.any()
    assert looks[0].feature.shape == (18,) and (looks[0].feature != looks[1].feature).all()
    label = torch.tensor([tokenizer.encode(TEXTS[0]).ids])
    prediction = model.predict(path.noisy(label, torch.zeros(1), 0), torch.zeros(1))
    nats = prediction.cross_entropy(label, reduction="none")[0]
    wanted = [*prediction.hidden[0].mean(0).tolist(), nats.mean().item(), nats.std(correction=0).item()]
    assert looks[0].feature == pytest.approx(np.array(wanted), rel=1e-4)
    said = judge.describe()
    assert (said["kind"], said["context"], said["precision"], len(said["sha256"])) == ("klflow_ext", 25, "float32", 64)


@pytest.mark.slow
def test_a_causal_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=data.train_tokenizer(["Once upon a time there was a cat."] * 3, 280), eos_token=data.END
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=20, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = open_judge(tmp_path)
    assert isinstance(judge, TransformersJudge) and judge.context == 20
    looks = judge.look(TEXTS)
    for text, look in zip(TEXTS[:2], looks, strict=False):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        with torch.no_grad():
            loss = model(torch.tensor([ids[:20]]), labels=torch.tensor([ids[:20]])).loss.item()
        assert look.bits == pytest.approx(loss * (len(ids[:20]) - 1) / math.log(2), rel=1e-5)
        assert look.size == pytest.approx(len(text) * min(1, 20 / len(ids))) and look.feature.shape == (18,)
    assert looks[2][:2] == (0, 0)
    assert judge.describe()["kind"] == "transformers" and len(judge.describe()["sha256"]) == 64
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer without BOS and EOS"):
        open_judge(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(ValueError, match="cannot be read as a causal model of transformers"):
        open_judge(tmp_path)


def test_folders_that_hold_no_judge(tmp_path):
    with pytest.raises(ValueError, match="has no stories260K.bin, no run of this package and no model of transformers"):
        open_judge(tmp_path)
    saved_run(tmp_path, MaskPath)
    with pytest.raises(ValueError, match=r"judge: got .* with MaskPath.*, allowed is an Autoregressive path"):
        open_judge(tmp_path)
