"""From a text file to a model: its tokenizer, its tokens, a training that looks at held-out text, and what the model writes.

    python examples/own_text.py FILE

`klflow train --data FILE --out RUN` does as much, and trains for slices. `load_run(RUN)` gives its model, path and tokenizer;
numpy.load of RUN/train.npy and RUN/heldout.npy gives its tokens.
"""

import sys
import tempfile
from pathlib import Path

import torch

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, Sampler, TrainConfig, Trainer, data, load_run
from klflow_ext.evaluate import unigram_log_prior

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "GUIDE.md"


def main(steps=200, file=GUIDE):
    torch.manual_seed(0)
    texts, held_texts = data.documents(file)  # a line <|endoftext|> ends a text; every twentieth text is held out
    tokenizer = data.train_tokenizer(texts, vocab_size=512)
    tokens, heldout = data.encode(tokenizer, texts), data.encode(tokenizer, held_texts)  # two long arrays
    path = LogitPath(data.vocab_size_of(tokenizer))
    shape = DenoiserConfig(path.vocab_size, n_layer=1, n_head=2, n_embd=64, max_length=16)
    model = Denoiser(shape, path, unigram_log_prior(tokens, path.vocab_size))
    config = TrainConfig(steps=steps, batch_size=16, length=16, heldout_every=20, heldout_count=4)
    records = []
    with tempfile.TemporaryDirectory() as run:
        Trainer(model, path, tokens, config, run, tokenizer, heldout).fit(progress=False, callback=records.append)
        model, path, tokenizer = load_run(run, best=True)  # as it was where the held-out loss was lowest
    losses = [record["loss"] for record in records]
    held_losses = [record["heldout_loss"] for record in records if record["heldout_loss"] is not None]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, of held-out text {held_losses[0]:.2f} -> {min(held_losses):.2f}")
    print(Sampler(model, path, tokenizer=tokenizer).complete(["klflow"], new_tokens=12).texts[0])
    return losses


if __name__ == "__main__":
    main(file=sys.argv[1] if len(sys.argv) > 1 else GUIDE)
