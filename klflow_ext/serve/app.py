"""The addresses of the server: who asks, waits, gives up or goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klflow_ext.serve.answer import answer
from klflow_ext.serve.batcher import Batcher, Done, Job, stopping
from klflow_ext.serve.events import answer_events, error_event, pass_event
from klflow_ext.serve.metrics import Metrics
from klflow_ext.serve.question import Question, read_question
from klflow_ext.serve.refusal import Refusal
from klflow_ext.serve.served import Served

GONE = 499  # the client went away: nobody reads it, but it is counted
COMPLETIONS, MODELS, HEALTH, METRICS = "/v1/completions", "/v1/models", "/health", "/metrics"


class App:
    """What the addresses do.

    Attributes:
        served, metrics, batcher: the model, what is counted, and what waits.
        asgi: the application, whose lifespan is that of the thread that runs the model.
    """

    def __init__(self, served: Served):
        self.served, self.metrics = served, Metrics()
        self.batcher = Batcher(served, self.metrics)
        routes = [
            Route(COMPLETIONS, self.completions, methods=["POST"]),
            Route(MODELS, self.models),
            Route(MODELS + "/{name:path}", self.model),
            Route(HEALTH, self.health),
            Route(METRICS, self.counted),
        ]
        handlers: Any = {Refusal: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _failed}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)
        self.asgi: ASGIApp = _Counting(app, self.metrics)

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        self.batcher.close()
        await run_in_threadpool(self.batcher.join)

    # ---- addresses

    async def completions(self, request: Request) -> Response:
        start = time.perf_counter()
        if self.batcher.closed:
            raise stopping()
        body = await self._body(request)
        question = await run_in_threadpool(read_question, body, self.served)
        if question.stream:
            return await self._streamed(request, question, start)
        self.batcher.submit(question.jobs)
        return JSONResponse(self._answer(question, await self._wait(request, question.jobs), start))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.served.name:
            raise Refusal(404, f"model: got {name!r}, allowed is {self.served.name!r}", "model", "model_not_found")
        return JSONResponse(self._about())

    async def health(self, request: Request) -> Response:
        status = "stopping" if self.batcher.closed else "ok"
        found = {"status": status, "waiting": self.batcher.waiting, "running": self.batcher.running}
        return JSONResponse(found, 200 if status == "ok" else 503)

    async def counted(self, request: Request) -> Response:
        text = self.metrics.text(self.batcher.waiting, self.batcher.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def _about(self) -> dict[str, Any]:
        served = self.served
        return {
            "id": served.name, "object": "model", "created": served.created, "owned_by": "klflow",
            "max_length": served.max_length, "methods": served.methods, "method": served.method(None),
        }  # fmt: skip

    # ---- a request

    async def _body(self, request: Request) -> bytes:
        most = self.served.limits.max_body

        async def read() -> bytes:
            found, length = bytearray(), 0
            async for part in request.stream():
                length += len(part)
                if length > 2 * most:
                    break
                if length <= most:
                    found += part
            if length > most:
                raise Refusal(413, f"body: got more than {most} bytes, allowed are {most}")
            return bytes(found)

        # A client that still sends when the connection is closed may not hear why: a little too much is read to its end.
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > 2 * most:
            raise Refusal(413, f"body: got {said[:20]} bytes, allowed are {most}")
        try:
            return await asyncio.wait_for(read(), self.served.limits.timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, f"body: it did not arrive in {self.served.limits.timeout:g} s") from None

    def _answer(self, question: Question, found: list[Done], start: float) -> dict[str, Any]:
        """Of a request that came at `start`; it is counted."""
        whole = answer(question, found, self.served)
        usage = whole["usage"]
        self.metrics.answered(time.perf_counter() - start, usage["prompt_tokens"], usage["completion_tokens"])
        return whole

    async def _streamed(self, request: Request, question: Question, start: float) -> Response:
        """Nothing is sent before there is something to send: until then an error has its own status."""
        loop, passes = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        if question.passes:
            for i, job in enumerate(question.jobs):
                job.watch = lambda found, row, i=i: loop.call_soon_threadsafe(
                    passes.put_nowait, pass_event(question, self.served, i, found, row)
                )
        self.batcher.submit(question.jobs)
        waiting = asyncio.create_task(self._wait(request, question.jobs))
        waiting.add_done_callback(_look)
        waiting.add_done_callback(lambda _: passes.put_nowait(None))

        async def events(first: str | None) -> AsyncIterator[str]:
            try:
                event = first
                while event is not None:
                    yield event
                    event = await passes.get()
                for event in answer_events(question, self._answer(question, waiting.result(), start)):
                    yield event
            except Refusal as error:
                yield error_event(error)
            except ClientDisconnect:
                pass
            finally:
                waiting.cancel()

        first = await passes.get()
        if first is None:
            waiting.result()  # raises what it was refused with
        return StreamingResponse(events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _wait(self, request: Request, jobs: list[Job]) -> list[Done]:
        """What comes of jobs that are in the queue.

        Raises:
            Refusal: 504, they waited too long; or what the thread that runs them says.
            ClientDisconnect: nobody waits for them any more.
        """
        done = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        done.add_done_callback(_look)
        gone = asyncio.create_task(_disconnected(request))
        either: set[asyncio.Future[Any]] = {done, gone}
        try:
            limit: float | None = self.served.limits.timeout
            if not (await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED))[0]:
                if self.batcher.drop(jobs):
                    raise Refusal(504, f"queue: got no turn in {limit:g} s")
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            return done.result()
        finally:
            gone.cancel()
            self.batcher.drop(jobs)
            done.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _look(ended: asyncio.Future[Any]) -> None:
    """Looks at an error that nobody may be there to hear of: else asyncio complains."""
    if not ended.cancelled():
        ended.exception()


# ---- errors


async def _refused(request: Request, error: Refusal) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    return JSONResponse(error.body(), error.status, headers)


async def _http(request: Request, error: HTTPException) -> Response:
    return JSONResponse(Refusal(error.status_code, error.detail).body(), error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, "server: it failed").body(), 500)


class _Counting:
    """Counts each answer by its path, where that is one of ours, and its status."""

    PATHS = (COMPLETIONS, MODELS, HEALTH, METRICS)

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.PATHS else "other"
                self.metrics.request(path, message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
