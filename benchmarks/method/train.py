"""One run: trained for a number of steps, its held-out loss by step and by time."""

from __future__ import annotations

import time

import numpy as np
import torch
from compared import BATCH, LENGTH, METHODS, held_texts, label, text_streams, update

from klflow_ext import Denoiser, DenoiserConfig, TrainConfig, Trainer, evaluate
from klflow_ext.muon import multiplies_bfloat16
from klflow_ext.run import Run

EVERY = 8  # measurements of the held-out loss in a run


def train(arguments) -> None:
    make_path, model_options, train_options = METHODS[arguments.name]
    tokenizer, stream, held = text_streams(arguments)
    vocab = tokenizer.get_vocab_size()
    torch.manual_seed(arguments.seed)
    path = make_path(vocab)
    prior = evaluate.unigram_log_prior(stream, vocab)
    model = Denoiser(DenoiserConfig(vocab, 4, 4, 256, **model_options), path, prior)
    config = TrainConfig(
        steps=arguments.steps, batch_size=BATCH, length=LENGTH, seed=arguments.seed,
        dtype="bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32",
        **{"given_share": 0.0, **train_options},
    )  # fmt: skip
    out = arguments.runs / label(arguments)
    trainer = Trainer(model, path, stream, config)
    with Run.create(out, overwrite=True, tokenizer=tokenizer, stream=stream, heldout=held) as trainer.run:
        trainer.save()
    trainer.run = Run(out)
    curve, begin, seconds = [], time.perf_counter(), 0.0
    while trainer.progress() < 1:
        begin = time.perf_counter()
        trainer.train_step()
        seconds += time.perf_counter() - begin
        if trainer.step % (arguments.steps // EVERY) == 0:
            losses = evaluate.loss_by_time(model.eval(), path, held_texts(held, 64))
            model.train()
            curve.append({"step": trainer.step, "loss": float(np.mean(list(losses.values())))})
            left = seconds / trainer.step * (arguments.steps - trainer.step)
            print(
                f"{label(arguments)}: step {trainer.step}, held-out {curve[-1]['loss']:.3f}, {left:.0f} s left",
                flush=True,
            )
    trainer.save()
    losses = evaluate.loss_by_time(trainer.averaged_model().eval(), path, held_texts(held, 256))
    update(
        arguments, losses={f"{t:.3f}": loss for t, loss in losses.items()}, curve=curve, train_seconds=seconds,
        threads=torch.get_num_threads(), dtype=config.dtype, unigram=evaluate.unigram_entropy(held, vocab, prior),
    )  # fmt: skip
