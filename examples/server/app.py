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
from typing import Annotated, Any, Literal

from engine import Answers, Engine, Wish
from jinja2 import TemplateError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import headstart as hs

MAX_ANSWERS = 64  # of one request


def several(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False


class Asked(BaseModel, extra="forbid"):
    """What a request may say, besides null. Anything else is refused, never ignored."""

    model: str
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(several), Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Completion(Asked):
    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]


class Text(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[Text]

    def plain(self) -> dict[str, str]:
        said = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": said}


class Chat(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def prompts_of(asked: Completion | Chat, tokenizer: Any, name: str) -> list[list[int]]:
    """The tokens of every prompt of a request."""
    if isinstance(asked, Chat):
        if tokenizer.chat_template is None:
            raise HTTPException(400, f"{name!r} has no chat template: use /v1/completions")
        said = [message.plain() for message in asked.messages]
        try:
            text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise HTTPException(400, f"messages: the chat template of {name!r} refuses them: {error}") from error
        return [tokenizer(text, add_special_tokens=False)["input_ids"]]
    given: Any = several(asked.prompt)
    if isinstance(given[0], int):
        given = [given]
    found = [one if isinstance(one, list) else tokenizer(one)["input_ids"] for one in given]
    if any(not 0 <= token < len(tokenizer) for one in found for token in one):
        raise HTTPException(400, f"prompt: tokens of {name!r} are 0 to {len(tokenizer) - 1}")
    return found


def answers_of(asked: Completion | Chat, app: Any) -> Answers:
    """A request as the engine takes it."""
    engine: Engine = app.engine
    if asked.model != app.name and asked.model not in engine.bank:
        raise HTTPException(404, f"there is no model {asked.model!r} here: GET /v1/models lists what there is")
    prompts = prompts_of(asked, engine.tokenizer, app.name)
    limit = (asked.max_completion_tokens if isinstance(asked, Chat) else None) or asked.max_tokens
    for tokens in prompts:
        if not 0 < len(tokens) <= engine.room - limit:
            raise HTTPException(
                400, f"{len(tokens)} tokens of prompt and {limit} new ones: 1 to {engine.room} have room"
            )
    if len(prompts) * asked.n > MAX_ANSWERS:
        raise HTTPException(400, f"{len(prompts)} prompts and n of {asked.n}: at most {MAX_ANSWERS} answers at once")
    adapter = None if asked.model == app.name else asked.model
    wish = Wish(limit, adapter, asked.temperature, asked.top_p, asked.seed, tuple(filter(None, asked.stop)))
    return Answers(prompts, wish, asked.n)


async def complete(request: Request) -> Response:
    """Both kinds of completions."""
    chat = request.url.path.endswith("chat/completions")
    try:
        asked: Chat | Completion = (Chat if chat else Completion).model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    answers = answers_of(asked, request.app.state)
    for job in answers.jobs:
        request.app.state.engine.waiting.put(job)
    kind = ("chat.completion" + ".chunk" * asked.stream) if chat else "text_completion"
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}

    def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        where = {("delta" if asked.stream else "message"): said} if chat else {"text": text}
        return {"index": index, **where, "logprobs": None, "finish_reason": reason}

    async def events() -> AsyncIterator[str]:
        try:
            async for index, piece in answers.pieces():
                reason = None if piece else answers.jobs[index].reason
                yield event({**head, "choices": [choice(index, piece, reason)]})
            if asked.stream_options.include_usage:
                yield event({**head, "choices": [], "usage": answers.usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(problem(500, str(error)))

    if asked.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    texts = [""] * len(answers.jobs)
    try:
        async for index, piece in answers.pieces():
            texts[index] += piece
    except Exception as error:
        raise HTTPException(500, str(error)) from error
    choices = [choice(job.index, text, job.reason) for job, text in zip(answers.jobs, texts, strict=True)]
    return JSONResponse({**head, "choices": choices, "usage": answers.usage()})


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def models(request: Request) -> Response:
    """All of them, or one."""
    names = (request.app.state.name, *request.app.state.engine.bank.names)
    told = {n: {"id": n, "object": "model", "created": 0, "owned_by": "headstart"} for n in names}
    asked = request.path_params.get("name")
    if asked is None:
        return JSONResponse({"object": "list", "data": list(told.values())})
    if asked not in told:
        raise HTTPException(404, f"there is no model {asked!r} here: GET /v1/models lists what there is")
    return JSONResponse(told[asked])


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
    code = "model_not_found" if status == 404 else None
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


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
        Route("/v1/models/{name:path}", models),
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
