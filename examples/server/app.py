"""OpenAI-style completions over one base, the adapter named per request as `model`.

    MODEL=HuggingFaceTB/SmolLM2-135M-Instruct ADAPTERS=adapters/ \\
        python -m uvicorn --factory --app-dir examples/server app:from_environment

    GET    /v1/models               the base and its adapters: what `model` may be in a request
    POST   /v1/completions          prompt → text, streamed where `stream` is true
    POST   /v1/chat/completions     the same for messages
    POST   /v1/adapters/NAME        load ADAPTERS/NAME, or load it again; DELETE removes it

There is no authentication: put it behind something that has one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from engine import Engine, Job
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import headstart as hs


class Asked(BaseModel, extra="forbid"):
    """What a request may say. Anything else is refused, never ignored."""

    model: str
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    stream: bool = False
    n: Literal[1] = 1
    top_p: Literal[1] = 1
    user: str | None = None


class Completion(Asked):
    prompt: str


class Message(BaseModel):
    role: str
    content: str


class Chat(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def job_of(asked: Completion | Chat, app: Any) -> Job:
    """A request as the engine takes it."""
    engine: Engine = app.engine
    if asked.model != app.name and asked.model not in engine.bank:
        raise HTTPException(404, f"there is no model {asked.model!r} here: GET /v1/models lists what there is")
    if isinstance(asked, Chat):
        if engine.tokenizer.chat_template is None:
            raise HTTPException(400, f"{app.name!r} has no chat template: use /v1/completions")
        said = [message.model_dump() for message in asked.messages]
        prompt = engine.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        tokens = engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        limit = asked.max_completion_tokens or asked.max_tokens
    else:
        tokens, limit = engine.tokenizer(asked.prompt)["input_ids"], asked.max_tokens
    if not 0 < len(tokens) <= engine.room - limit:
        raise HTTPException(400, f"{len(tokens)} tokens of prompt and {limit} new ones: 1 to {engine.room} have room")
    return Job(tokens, limit, asked.temperature, None if asked.model == app.name else asked.model)


async def complete(request: Request) -> Response:
    """Both kinds of completions."""
    chat = request.url.path.endswith("chat/completions")
    try:
        asked: Chat | Completion = (Chat if chat else Completion).model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    job = job_of(asked, request.app.state)
    request.app.state.engine.waiting.put(job)
    kind = ("chat.completion" + ".chunk" * asked.stream) if chat else "text_completion"
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}

    def body(text: str, reason: str | None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        choice = {("delta" if asked.stream else "message"): said} if chat else {"text": text}
        return {**head, "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": reason}]}

    async def events() -> AsyncIterator[str]:
        try:
            async for piece in job.text():
                if piece:
                    yield f"data: {json.dumps(body(piece, None))}\n\n"
            yield f"data: {json.dumps(body('', job.reason))}\n\ndata: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(problem(500, str(error)))}\n\n"

    if asked.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    try:
        text = "".join([piece async for piece in job.text()])
    except Exception as error:
        raise HTTPException(500, str(error)) from error
    used = {"prompt_tokens": len(job.tokens), "completion_tokens": len(job.made)}
    return JSONResponse({**body(text, job.reason), "usage": {**used, "total_tokens": sum(used.values())}})


async def models(request: Request) -> Response:
    names = (request.app.state.name, *request.app.state.engine.bank.names)
    return JSONResponse({"object": "list", "data": [{"id": n, "object": "model", "owned_by": ""} for n in names]})


async def adapters(request: Request) -> Response:
    """Load an adapter from its folder, or remove it, while others are served."""
    state, name, removing = request.app.state, request.path_params["name"], request.method == "DELETE"
    if not re.fullmatch(r"\w[\w.-]*", name) or name == state.name:
        raise HTTPException(400, f"{name!r} is no name of an adapter's folder")
    try:
        if removing:
            state.engine.bank.remove(name)
        else:
            await run_in_threadpool(state.engine.bank.load, name, state.adapters / name, replace=True)
    except hs.HeadstartError as error:
        raise HTTPException(404 if removing else 400, str(error)) from error
    return JSONResponse({"id": name, "object": "model", "deleted": removing})


def problem(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": "model_not_found" if status == 404 else None}}


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(problem(error.status_code, error.detail), error.status_code)


def create_app(model: Any, tokenizer: Any, name: str, adapters_in: Path) -> Starlette:
    """The application for a loaded model, called `name`, and the adapters in a folder."""
    adapters_in = adapters_in.resolve()  # "adapters/fr" could also be a name on the hub.
    engine = Engine(model, tokenizer, adapters_in)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        thread = threading.Thread(target=engine.work, daemon=True)
        thread.start()
        yield
        engine.waiting.put(None)
        await run_in_threadpool(thread.join)
        engine.bank.close()

    routes = [
        Route("/v1/models", models),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/adapters/{name}", adapters, methods=["POST", "DELETE"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refused})
    app.state.engine, app.state.name, app.state.adapters = engine, name, adapters_in
    return app


def from_environment() -> Starlette:
    """MODEL: a folder, or a name on the hub. ADAPTERS: a folder with an adapter in each of its folders."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.environ["MODEL"]
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
    return create_app(model, AutoTokenizer.from_pretrained(name), name, Path(os.environ["ADAPTERS"]))
