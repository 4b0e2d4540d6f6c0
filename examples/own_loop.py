"""A training loop of one's own. Its losses are those of a Trainer: the same batches, times, given tokens, noise and optimizers.

The model is a plain module `model(x_t, t) -> logits`; a Denoiser or any other Network is trained by the same lines.
"""

import torch

from klflow_ext import Batches, LogitPath, TrainConfig
from klflow_ext.train import make_optimizers


class Plain(torch.nn.Module):
    """Reads rows of the simplex, which it must scale, for their entries are all near 1 / V, by weights of variance 1."""

    def __init__(self, path, width=64):
        super().__init__()
        self.path = path
        self.read = torch.nn.Linear(path.vocab_size, width)
        torch.nn.init.normal_(
            self.read.weight
        )  # torch's own start, sqrt(3 V) times smaller, drowns beside what is added
        self.mix = torch.nn.Conv1d(width, width, 5, padding=2)
        self.head = torch.nn.Linear(width, path.vocab_size)

    def forward(self, x, t):
        h = self.read(self.path.scaled(x))
        return self.head(h + torch.relu(self.mix(h.mT)).mT)


def train(model, path, stream, config):
    """The loss of every step."""
    batches = Batches.of(stream, path, config, model)
    optimizers = make_optimizers(model, path, config)
    losses = []
    for step in range(config.steps):
        loss = batches.batch(step).loss(path, model)  # the noise is another in every step: rng is (seed, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step / config.steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(steps=200):
    torch.manual_seed(0)
    path = LogitPath(vocab_size=20)
    stream = torch.arange(2000).mul(3).remainder(20).numpy()  # tokens of a text
    config = TrainConfig(steps=steps, batch_size=8, length=16)
    losses = train(Plain(path), path, stream, config)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
