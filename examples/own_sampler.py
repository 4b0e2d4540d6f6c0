"""A sampler step of one's own: `step(path, state, prediction, move) -> state`, registered by a name.

`state` is where the sequences are, `prediction` what the network says of it, `move` one move of the grid of times. Here the surest
half of the positions keeps its best token, the others draw; all are then re-noised to the next time.
"""

import torch

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, Sampler, TrainConfig, Trainer, register_sampler


@register_sampler("half_sure")
def half_sure(path, state, prediction, move):
    tokens, p = prediction.largest(1, move.temperature)
    sure = p[..., 0] >= p[..., 0].median(dim=1, keepdim=True).values
    tokens = torch.where(sure, tokens[..., 0], move.draw(prediction))
    tokens = torch.where(move.given, move.known, tokens)
    return path.renoise(tokens, move.t_next, move.rng, move.given)


def main(steps=100):
    torch.manual_seed(0)
    path = LogitPath(vocab_size=20)
    stream = torch.arange(2000).mul(3).remainder(20).numpy()  # 3 more each time
    model = Denoiser(DenoiserConfig(20, n_layer=1, n_head=2, n_embd=32, max_length=16), path)
    trainer = Trainer(model, path, stream, TrainConfig(steps=steps, batch_size=8, length=16))
    losses = [trainer.train_step() for _ in range(steps)]
    tokens = Sampler(model, path).sample((4, 16), steps=16, method="half_sure").tokens
    right = (tokens.diff() % 20 == 3).float().mean().item()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {right:.0%} of the steps in the samples are by 3")
    return losses


if __name__ == "__main__":
    main()
