"""klflow adapt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from klflow_ext.cli.terminal import choose_device, shows_progress
from klflow_ext.cli.train import Plan, Training, say
from klflow_ext.model.config import Input
from klflow_ext.train import prepare
from klflow_ext.train.processes import noticing_loss


@dataclass(kw_only=True)
class Adapt(Training):
    """Adapt a language model of transformers to flow matching: its weights, its tokenizer and its output layer, trained on a text as
    klflow train does. All commands that take a run then take this one.

    BERT, ModernBERT, RoBERTa, GPT-2, Llama, Mistral, Qwen and what else takes inputs_embeds and ends with one linear layer.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """The folder of a masked or causal language model, or its name in the Hub's cache (`hf download NAME` fetches it)."""
    out: Path = Path("runs/adapted")
    causal: bool = False
    """Keep a decoder's causal mask; else every position sees all others."""
    beta: float = 0.01
    """Of the logit path, x_1 = (1 - beta) onehot + beta / V, in (0, 1)."""
    t_max: float | None = None
    """Of the logit path, the largest time, in (0, 1)."""
    input: Input = "posterior"
    """What the network reads: the posterior of each row, or the row itself, "simplex"."""
    train: tyro.conf.OmitArgPrefixes[Plan] = field(default_factory=lambda: Plan(lr=1e-4, optimizer="adamw"))

    def run(self):
        self.check()
        try:
            from transformers.utils.logging import disable_progress_bar

            from klflow_ext.transformer import TransformerDenoiser
        except ImportError:
            raise ImportError("klflow adapt needs the hf extra: pip install 'klflow_ext[hf]'") from None
        if not shows_progress():
            disable_progress_bar()
        device = choose_device(self.device)
        model = TransformerDenoiser.of(
            self.model, causal=self.causal, beta=self.beta, t_max=self.t_max, input=self.input
        )
        with ExitStack() as owned:
            owned.enter_context(noticing_loss(lambda: "start it again with klflow train --resume"))
            prepared = prepare(
                self.data or None, self.out, train=self.train, network=model, tokenizer=model.tokenizer,
                overwrite=self.overwrite, device=device, report=say,
            )  # fmt: skip
            adapted = self.fit(prepared.trainer)
        self.report(prepared.trainer, adapted, prepared.heldout)
