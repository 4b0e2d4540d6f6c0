"""klflow adapt: a small random BERT and GPT-2 from their folders to runs that every command takes."""

import json

import pytest
import torch

from klflow_ext import Sampler, TransformerDenoiser, data, load_run

transformers = pytest.importorskip("transformers")

TEXT = [f"the cat {i} sat on the mat and the dog ran away . " * 3 for i in range(80)]
SMALL = ["--steps", "60", "--length", "16", "--batch-size", "8", "--lr", "3e-3", "--heldout-every", "30", "-q"]


def bert_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.enable_truncation(8)  # as some come; the text is not cut for it
    return tokenizer, {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}


def saved(folder, kind):
    torch.manual_seed(0)
    tokenizer, special = (
        bert_tokenizer() if kind == "bert" else (data.train_tokenizer(TEXT, 280), {"eos_token": data.END})
    )
    vocab_size = data.vocab_size_of(tokenizer) + 3  # a padded vocabulary
    if kind == "bert":
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=vocab_size, max_position_embeddings=32, **shape)
        made = transformers.BertForMaskedLM(config)
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=1, n_head=2, n_positions=32)
        )
    made.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind,causal", [("bert", False), ("gpt2", False), ("gpt2", True)])
def test_adapted_by_one_command(klflow, tmp_path, kind, causal):
    saved(tmp_path / "pretrained", kind)
    (tmp_path / "text").write_text(f"\n{data.END}\n".join(TEXT))
    done = klflow("adapt", "pretrained", "--data", "text", "--out", "run", *SMALL, *["--causal"] * causal)
    assert done.returncode == 0 and "run folder: run" in done.stdout, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.8 * sum(losses[:10])

    model, path, tokenizer = load_run("run")
    assert isinstance(model, TransformerDenoiser) and model.causal is causal and model.reads_posterior
    assert path.vocab_size == data.vocab_size_of(tokenizer) == model.head.out_features - 3
    prior = model.log_prior.exp()  # that of the text, not a uniform one
    assert (
        prior[tokenizer.token_to_id("the")] > 5 / path.vocab_size
        if kind == "bert"
        else prior.max() > 5 / path.vocab_size
    )
    (text,) = Sampler(model, path, tokenizer=tokenizer).complete(["the cat"], 12, steps=8).texts
    assert text.startswith("the cat")

    done = klflow("sample", "run", "--steps", "4", "--count", "2", "--length", "16")
    assert done.returncode == 0 and "\n\n" in done.stdout, done.stderr
    done = klflow("train", "--resume", "run", "--more-steps", "1", "-q")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 61


def test_what_cannot_be_adapted(klflow, tmp_path):
    saved(tmp_path / "pretrained", "bert")
    (tmp_path / "text").write_text(f"\n{data.END}\n".join(TEXT))
    assert klflow("prepare", "text", "--out", "tokens", "--vocab-size", "280").returncode == 0
    for words, message in (
        (["nowhere"], "transformer: nowhere cannot be read ("),
        (["text"], "transformer: text cannot be read ("),
        (["pretrained", "--causal"], "causal: got True, allowed for BertForMaskedLM is False"),
        (["pretrained", "--length", "99"], "length: got 99, allowed is at most max_length = 32 of the model"),
        (["pretrained", "--data", "tokens"], "data: tokens has another tokenizer, allowed is that of the model"),
        (["pretrained", "--beta", "2"], "beta: got 2.0, allowed is a number in (0, 1)"),
        (["pretrained", "--show-every", "-1"], "show_every: got -1"),
    ):
        done = klflow("adapt", "--data", "text", "--length", "16", *words[1:], "--", words[0])
        assert done.returncode == 1 and message in done.stderr, (words, done.stderr)
    assert not (tmp_path / "runs").exists()


def test_the_token_that_ends_a_text():
    tokenizer, _ = bert_tokenizer()
    assert data.end_of(tokenizer) == tokenizer.token_to_id("[SEP]") == 3
    assert data.encode(tokenizer, ["the cat", "the dog"]).tolist()[2::3] == [3, 3]
    assert data.end_of(data.train_tokenizer(TEXT, 280)) == 0
    without = type(tokenizer)(type(tokenizer.model)({"the": 0}, unk_token="the"))
    assert data.end_of(without) is None
    with pytest.raises(ValueError, match="^tokenizer: got one without a token that ends a text"):
        data.encode(without, ["the"])
