"""An HTTP server that completes and infills, asked as OpenAI's `/v1/completions` is: `klflow serve`, the `serve` extra.

    limits.py    Limits: what a request, a batch and the queue may hold
    refusal.py   Refusal: an error, as the client reads it
    served.py    Served: the model, its name, and which methods it has
    question.py  Question: the body of a request, checked, as sequences to fill
    batcher.py   Batcher: sequences that wait; one thread runs those together that can be
    answer.py    the text of what came out, cut where it ends
    events.py    an answer as server-sent events, also pass by pass
    metrics.py   what is counted, as Prometheus reads it
    app.py       the addresses: who asks, waits, gives up or goes away
    server.py    the socket, the signals, and the end

A sequence has its own seed, so its tokens do not depend on which others it ran with. Nothing is kept of a request when it is
answered. There is no password: who reaches the port may ask.
"""

from klflow_ext.serve.limits import Limits

__all__ = ["Limits"]
