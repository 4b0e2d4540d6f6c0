"""klflow serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from klflow_ext.cli.command import Command
from klflow_ext.cli.terminal import choose_device, note
from klflow_ext.run import load_run
from klflow_ext.sample import Sampler
from klflow_ext.serve import Limits
from klflow_ext.train.signals import Signals, stopped


@dataclass
class Serve(Command):
    """Answer requests for completions over HTTP, asked as OpenAI's /v1/completions is.

    POST /v1/completions takes model, prompt (a string, token ids, or a list of these), suffix (then the answer stands between both),
    max_tokens, temperature, top_p, n, seed, stop, echo, stream; and of its own steps, top_k, method, log_likelihood, confidence and,
    with stream, passes: an event for each. GET /v1/models, /health and /metrics. There is no password: whoever reaches the port may
    ask.
    """

    run_folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run folder, or one of save_pretrained. Without it, the model of English stories that comes with the package."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every network that this machine is in."""
    port: int = 8000
    """0: one that is free, which stderr tells."""
    name: str | None = None
    """Of the model, in answers; without it, that of the folder."""
    limits: tyro.conf.OmitArgPrefixes[Limits] = field(default_factory=Limits)
    device: str | None = None
    """cuda where torch sees a GPU and the kernels were built for it, else cpu."""

    def run(self):
        try:
            from klflow_ext.serve.app import App
            from klflow_ext.serve.served import Served
            from klflow_ext.serve.server import Server, address, listen
        except ImportError as error:
            raise ImportError(
                f"klflow serve needs the serve extra: pip install 'klflow_ext[serve]' ({error})"
            ) from None
        with Signals("SIGINT", "SIGTERM") as signals, listen(self.host, self.port) as socket:
            model, path, tokenizer = load_run(self.run_folder)
            device = choose_device(self.device)
            sampler = Sampler(model.to(device), path, device, tokenizer=tokenizer)
            name = self.name or ("stories" if self.run_folder is None else self.run_folder.resolve().name)
            server = Server(App(Served(sampler, name, self.limits)))
            if not signals.number:
                note(f"klflow: {name} answers at {address(socket)}/v1/completions")
                server.run([socket])
        if signals.number:
            raise stopped(signals.number, "what ran is answered")
