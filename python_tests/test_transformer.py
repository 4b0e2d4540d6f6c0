"""Transformers as denoisers, small and random: their own logits where tokens are certain, the mask, heads, files, and what cannot be."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from klflow_ext import LinearPath, LogitPath, MaskPath, Sampler, TrainConfig, Trainer, TransformerDenoiser, load_run
from klflow_ext.path import State, as_network

transformers = pytest.importorskip("transformers")

V, LONGEST = 60, 32
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": LONGEST, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1}
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {"cls_token_id": 1, "sep_token_id": 2}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")


def transformer(kind, attention="sdpa", **changes):
    torch.manual_seed(0)
    name, config, more = MODELS[kind]
    made = getattr(transformers, name)(getattr(transformers, config)(**{**SHAPE, **more, **changes})).eval()
    made.set_attn_implementation(attention)
    for parameter in made.parameters():  # far from the small weights and zero biases that they start with
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def own_logits(made, tokens, sees_all):
    """What the transformer says by itself; sees_all: with a mask of its own that hides nothing."""
    mask = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1]) if sees_all else None
    with torch.no_grad():
        return made(input_ids=tokens, attention_mask=mask).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind,causal", [(k, False) for k in MODELS] + [(k, True) for k in DECODERS])
def test_its_own_logits_where_tokens_are_certain(kind, causal, attention):
    """All logits, those of a prediction, and its loss; with the causal mask and without."""
    made = transformer(kind, attention)
    tokens = torch.randint(1, V, (3, 9), generator=torch.Generator().manual_seed(1))
    want = own_logits(made, tokens, kind in DECODERS and not causal)
    model = TransformerDenoiser(made, causal=causal).eval()
    path = model.path
    assert path.vocab_size == V and model.max_length == LONGEST - (kind == "roberta") and model.causal is causal
    onehot, t = F.one_hot(tokens, V).float(), torch.ones(3)
    with torch.no_grad():
        torch.testing.assert_close(model(onehot, t), want, rtol=1e-4, atol=1e-4)
        prediction = as_network(model, LogitPath(V)).predict(State(onehot), t)
        torch.testing.assert_close(prediction.logits, want, rtol=1e-4, atol=1e-4)
        given = torch.ones_like(tokens, dtype=torch.bool)
        state = path.noisy(tokens, torch.full((3, 1), 0.1), 0, given=given)
        torch.testing.assert_close(
            as_network(model, LogitPath(V)).predict(state, path.model_times(torch.full((3,), 0.1), given, True)).logits,
            want, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
        assert not state.is_made
    first = own_logits(made := transformer(kind, attention), tokens, False)
    if kind in DECODERS:
        assert torch.allclose(first, want, atol=1e-3) == causal


@pytest.mark.parametrize("reads", ["posterior", "simplex"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_learns_without_rows_or_logits(kind, reads):
    """The loss falls, with gradients everywhere; noise is read as its rows are; samples are tokens."""
    model = TransformerDenoiser(transformer(kind), input=reads)
    path, stream = model.path, np.arange(2000) * 7 % 10
    target, t = torch.randint(V, (2, 6)), torch.tensor([0.05, 0.2])
    given = torch.rand(2, 6) < 0.3
    times = path.model_times(t, given, True)
    torch.testing.assert_close(
        model.embed(path.sample(target, t[:, None], 3, given=given), times),
        model.embed_noise(target, t, 3, given=given), rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    path.loss(model, target, t, 0, given=given).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    quiet = ("bias", "position", "token_type")  # keys' biases change nothing
    assert not [name for name in missing if not any(word in name for word in quiet)]
    model.zero_grad()
    trainer = Trainer(model, path, stream, TrainConfig(steps=30, batch_size=8, length=8, lr=3e-3))
    losses = [trainer.train_step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    found = Sampler(model, path).complete([[0, 7, 14]], 8, steps=4)
    assert found.tokens.shape == (1, 8) and found.tokens.max() < V


def test_simplex_rows_have_the_size_of_embeddings():
    model = TransformerDenoiser(transformer("bert"), LogitPath(V), input="simplex")
    h = model.embed_noise(torch.zeros(4, 8, dtype=torch.int64), 0.0, 0) - model.table.mean(0)
    rows = model.table - model.table.mean(0)
    assert h.square().mean().sqrt().item() == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("path", [LinearPath(V), MaskPath(V)], ids=repr)
def test_other_paths(path):
    model = TransformerDenoiser(transformer("llama"), path)
    assert model.input == ("tokens" if path.reads == "tokens" else "simplex")
    path.loss(model, torch.randint(V, (2, 6)), torch.full((2,), 0.3), 0).backward()
    assert model.transformer.get_input_embeddings().weight.grad.any()
    if path.reads == "tokens":
        assert model.extra.grad.any()
    assert Sampler(model, path).sample((2, 6), steps=3).tokens.max() < V


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_padded_vocabulary(kind):
    """The rows behind the tokenizer's get no probability, even where they would win; tied weights stay tied."""
    made = transformer(kind)
    with torch.no_grad():
        made.get_input_embeddings().weight[50:] = 30.0
    model = TransformerDenoiser(made, LogitPath(50))
    assert model.head.weight is model.transformer.get_input_embeddings().weight and model.vocab_size == 50
    assert model(F.one_hot(torch.tensor([[1, 2]]), 50).float(), torch.ones(1)).shape == (1, 2, 50)
    path = model.path
    path.loss(model, torch.randint(50, (2, 6)), torch.full((2,), 0.1), 0).backward()
    assert not model.head.weight.grad[50:].any() and model.head.weight.grad[:50].any()
    assert Sampler(model, path).sample((3, 8), steps=3, top_k=50).tokens.max() < 50


def test_sixteen_bits_and_recomputing():
    made = transformer("llama").bfloat16()
    model = TransformerDenoiser(made)
    loss = model.path.loss(model, torch.randint(V, (2, 6)), torch.full((2,), 0.1), 0)
    assert model.log_prior.dtype == torch.float32 and loss.dtype == torch.float32 and loss.isfinite()
    stream = np.arange(500) * 7 % V
    losses = []
    for recompute in (False, True):
        again = TransformerDenoiser(transformer("llama"))
        trainer = Trainer(again, again.path, stream, TrainConfig(steps=2, batch_size=2, length=8, recompute=recompute))
        assert again.recompute is recompute and len(again.sharded_units()) == 2
        losses.append([trainer.train_step() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_run_folders(kind, tmp_path):
    """Of averaged and tied weights; training goes on bit for bit."""
    model = TransformerDenoiser(transformer(kind), causal=kind == "qwen3")
    stream = np.arange(500) * 7 % V
    config = TrainConfig(steps=4, batch_size=2, length=8, ema=0.5, lr=1e-3)
    trainer = Trainer(model, model.path, stream, config, tmp_path)
    trainer.train_step()
    trainer.save()
    loaded, path, _ = load_run(tmp_path)
    assert loaded.causal == (kind == "qwen3") and loaded.transformer.config.vocab_size == V
    averaged = trainer.averaged_model().eval()
    x, t = path.sample(torch.randint(V, (2, 6)), 0.2, 0), torch.full((2,), 0.2)
    with torch.no_grad():
        assert torch.equal(loaded(x, t), averaged(x, t))
        assert not torch.equal(loaded(x, t), model.eval()(x, t))
    again = Trainer(loaded.train(), path, stream, config, tmp_path)
    again.load()
    torch.manual_seed(0)  # of dropout
    want = [trainer.train_step() for _ in range(2)]
    torch.manual_seed(0)
    assert [again.train_step() for _ in range(2)] == want


def test_a_softcap_is_kept():
    shape = {**SHAPE, **GROUPED, "head_dim": 16, "final_logit_softcapping": 0.5}
    made = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape))
    made.model.embed_tokens.embed_scale.fill_(1.0)  # a Gemma scales its embeddings, which is refused below
    tokens = torch.tensor([[3, 4, 5]])
    want = own_logits(made.eval(), tokens, False)
    model = TransformerDenoiser(made, causal=True).eval()
    assert model.softcap == 0.5 and want.abs().max() < 0.5
    with torch.no_grad():
        torch.testing.assert_close(model(F.one_hot(tokens, V).float(), torch.ones(1)), want, rtol=1e-4, atol=1e-5)
    assert model.to_dict()["config"]["final_logit_softcapping"] == 0.5


def refused():
    t = transformers
    shape = {**SHAPE, **GROUPED}
    bert = lambda: transformer("bert")  # noqa: E731
    t5 = {"vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    gemma, mamba = (
        t.Gemma2Config(**shape, head_dim=16),
        t.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1),
    )
    xlm = t.XLMConfig(vocab_size=V, emb_dim=32, n_layers=1, n_heads=2)
    return [
        (lambda: torch.nn.Linear(2, 2), {}, "transformer: got Linear, allowed is a model of transformers"),
        (lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)), {}, "transformer: got T5.*, an encoder-decoder"),
        (lambda: t.BertModel(t.BertConfig(**SHAPE)), {}, "transformer: got BertModel with no output layer"),
        (
            lambda: t.XLMForSequenceClassification(xlm),
            {},
            "transformer: got XLMForSequenceClassification with no output",
        ),
        (lambda: t.Gemma2ForCausalLM(gemma), {}, "transformer: got a Gemma2ForCausalLM whose logits are off by"),
        (lambda: t.MambaForCausalLM(mamba), {}, "transformer: got a MambaForCausalLM, which does not run without"),
        (bert, {"causal": True}, "causal: got True, allowed for BertForMaskedLM is False"),
        (bert, {"path": LogitPath(V + 1)}, "embedding: got 60 tokens, allowed are at least those of the path, V = 61"),
        (bert, {"input": "tokens"}, "input: got 'tokens', allowed is one of"),
        (bert, {"tokenizer": "bert"}, "tokenizer: got str, allowed is a fast one"),
    ]


@pytest.mark.parametrize("number", range(len(refused())))
def test_what_is_refused(number):
    make, options, message = refused()[number]
    made = make()
    before = copy.deepcopy(made).eval()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        TransformerDenoiser(made, **options)
    if number > 1 and hasattr(before, "config") and not before.config.is_encoder_decoder:  # it is what it was
        assert [name for name, _ in made.named_modules()] == [name for name, _ in before.named_modules()]
        assert made.config.to_dict() == before.config.to_dict()


def test_without_inputs_embeds():
    class Deaf(transformers.BertForMaskedLM):
        def forward(self, input_ids=None, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    with pytest.raises(ValueError, match="^transformer: got Deaf, which takes no inputs_embeds"):
        TransformerDenoiser(Deaf(transformers.BertConfig(**SHAPE)))


def test_too_long():
    model = TransformerDenoiser(transformer("bert"))
    path, tokens = model.path, torch.zeros(1, LONGEST + 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"^target: got shape \(1, 33\), allowed is a length of at most max_length = 32"
    ):
        path.loss(model, tokens, torch.full((1,), 0.1), 0)
    with pytest.raises(ValueError, match="^length: got 33, allowed is at most max_length = 32"):
        Trainer(model, path, np.arange(500) % V, TrainConfig(length=33))
    with pytest.raises(ValueError, match="got a length of 33"):
        Sampler(model, path).sample((1, 33))
    with pytest.raises(ValueError, match="^h: got a length of 33"):
        model.hidden(torch.zeros(1, 33, 32), 0.1)
