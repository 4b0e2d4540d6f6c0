"""Networks that are no Denoiser, in a module that can be imported again."""

import torch

from klflow_ext import Reader


class Tied(Reader):
    """One matrix reads and writes."""

    def __init__(self, path, width=16):
        super().__init__(path)
        self.width, self.max_length = width, 32
        self.embedding = torch.nn.Embedding(path.vocab_size + (path.reads == "tokens"), width)
        self.mix = torch.nn.Conv1d(width, width, 3, padding=1)
        self.inner = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, path.vocab_size)
        if path.reads == "rows":
            self.head.weight = self.embedding.weight

    @property
    def table(self):
        return self.embedding.weight

    def hidden(self, h, t):
        return h + self.inner(torch.relu(self.mix(h.mT)).mT)

    def to_dict(self):
        return {"width": self.width}

    @classmethod
    def from_dict(cls, values, path):
        return cls(path, **values)


class Silent(Tied):
    """Does not say how it is made."""

    def to_dict(self):
        return None


class Plain(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path, self.head = path, torch.nn.Linear(path.vocab_size, path.vocab_size)

    def forward(self, x, t):
        return self.head(self.path.scaled(x))
