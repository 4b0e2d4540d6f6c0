"""A language model of `transformers` adapted to flow matching, saved with its tokenizer and a model card, loaded and sampled.

Here it is a small random BERT, so that nothing is downloaded. A pretrained one takes the same lines:

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = TransformerDenoiser(AutoModelForMaskedLM.from_pretrained(name), tokenizer=tokenizer)
"""

import tempfile

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from klflow_ext import Sampler, TrainConfig, Trainer, TransformerDenoiser, data
from klflow_ext.evaluate import unigram_log_prior

TEXT = "The sea is wide and the ship is small. The wind is cold and the night is long. " * 40


def main(steps=200):
    torch.manual_seed(0)
    tokenizer = data.train_tokenizer([TEXT], 300)
    vocab_size = data.vocab_size_of(tokenizer)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    transformer = BertForMaskedLM(BertConfig(vocab_size=vocab_size, max_position_embeddings=64, **shape))

    tokens = np.array(tokenizer.encode(TEXT).ids)
    prior = unigram_log_prior(tokens, vocab_size)
    model = TransformerDenoiser(transformer, tokenizer=tokenizer, log_prior=prior)
    trainer = Trainer(model, model.path, tokens, TrainConfig(steps=steps, batch_size=8, length=16))
    losses = [trainer.train_step() for _ in range(steps)]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, data="two sentences, again and again")  # or model.push_to_hub("owner/name")
        model = TransformerDenoiser.from_pretrained(folder)
    found = Sampler(model, model.path).complete([tokenizer.encode("The sea").ids], 16, steps=14)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}: {model.tokenizer.decode(found.tokens[0].tolist())!r}")
    return losses


if __name__ == "__main__":
    main()
