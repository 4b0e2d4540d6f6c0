"""The model card of a folder that is saved: README.md with the fields that the Hub reads at its top."""

from __future__ import annotations

from torch import nn

from klflow_ext.path import Path

CARD = """---
library_name: klflow_ext
pipeline_tag: text-generation
tags:
- flow-matching
- simplex
{extra}---

# {title}

A flow-matching language model on the simplex, a {kind} of {millions:.1f} M parameters with V = {vocab:,} tokens, on
`{path}`. It was made with `klflow_ext`.

- Data: {data}
- License: *not stated yet; to be filled in by whoever publishes this model*

## How to sample

```python
from klflow_ext import Sampler
from klflow_ext.hub import from_pretrained

model, path, tokenizer = from_pretrained("{name}")
found = Sampler(model, path).sample((4, 64), steps=64)
{decode}
```
"""


def model_card(
    model: nn.Module, path: Path, *, name: str, tokenizer: bool, data: str | None = None, base: str | None = None
) -> str:
    """The text of README.md.

    Args:
        model, path: what is saved.
        name: of the folder or repository, as it will be loaded.
        tokenizer: whether there is one.
        data: what it was trained on, in words; None: unknown.
        base: the repository whose weights it started from; None: none, or unknown.
    """
    return CARD.format(
        extra="" if base is None else f"base_model: {base}\n",
        title=name.rpartition("/")[2],
        name=name,
        kind=type(model).__name__,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        vocab=path.vocab_size,
        path=repr(path),
        data=data or "*not stated*",
        decode="print(*map(tokenizer.decode, found.tokens.tolist()), sep='\\n')"
        if tokenizer
        else "print(found.tokens)",
    )
