"""An encoder of one's own that takes embeddings (as `inputs_embeds` of other libraries): trained, saved, loaded and sampled.

A Reader does the rest: it turns noise into embeddings without a tensor of positions x V, and the loss needs no logits.
"""

import tempfile

import torch

from klflow_ext import LogitPath, Reader, Sampler, TrainConfig, Trainer, load_run
from klflow_ext.evaluate import unigram_log_prior


class Encoder(Reader):
    def __init__(self, path, width=64, layers=2, max_length=64, log_prior=None):
        super().__init__(path, log_prior=log_prior)
        self.settings, self.max_length = {"width": width, "layers": layers, "max_length": max_length}, max_length
        self.embedding = torch.nn.Embedding(path.vocab_size, width)
        self.position = torch.nn.Parameter(0.1 * torch.randn(max_length, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, path.vocab_size)

    @property
    def table(self):
        return self.embedding.weight

    def hidden(self, h, t):  # the posterior that a Reader reads holds the time already
        return self.encoder(h + self.position[: h.shape[1]])

    def to_dict(self):
        return self.settings

    @classmethod
    def from_dict(cls, values, path):
        return cls(path, **values)


def main(steps=100):
    torch.manual_seed(0)
    path = LogitPath(vocab_size=20)
    stream = torch.arange(2000).mul(3).remainder(20).numpy()
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(path, log_prior=unigram_log_prior(stream, path.vocab_size))  # how often each token comes
        trainer = Trainer(encoder, path, stream, TrainConfig(steps=steps, batch_size=8, length=16), folder)
        losses = [trainer.train_step() for _ in range(steps)]
        trainer.save()
        model, path, _ = load_run(folder)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; a sample: {Sampler(model, path).sample((1, 16)).tokens.tolist()}")
    return losses


if __name__ == "__main__":
    main()
