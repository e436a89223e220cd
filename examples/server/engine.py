"""The model's own thread: requests that wait together become the rows of one generation, each with its adapter.

A batch runs until its longest answer ends; what arrives meanwhile waits for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import headstart as hs

MAX_BATCH, WAIT = 32, 0.005  # rows, and seconds that the first of a batch waits for company


@dataclass(frozen=True)
class Wish:
    """How a request wants its answer.

    Attributes:
        limit: of new tokens; adapter: None for the base; stops: what ends a text, and is not part of it.
        temperature: 0 is greedy; top_p: the share of probability that is drawn from; seed: makes a draw repeatable.
    """

    limit: int
    adapter: str | None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


Piece = tuple[int, str | Exception | None]


class Job:
    """One answer on its way, a row of a batch.

    Attributes:
        tokens: of the prompt; index: among the answers of its request, whose pieces go to `out`.
        made: the answer's tokens; reason: why it ended, as OpenAI calls it.
    """

    def __init__(self, tokens: list[int], wish: Wish, index: int, out: asyncio.Queue[Piece]) -> None:
        self.tokens, self.wish, self.index = tokens, wish, index
        self.made: list[int] = []
        self.reason: str | None = None
        self.random: torch.Generator | None = None
        if wish.seed is not None:
            self.random = torch.Generator().manual_seed((wish.seed + index) % 2**63)
        self._sent, self._out, self._loop = 0, out, asyncio.get_running_loop()

    def put(self, piece: str | Exception | None) -> None:
        """From the engine's thread: some text, what went wrong, or the end."""
        self._loop.call_soon_threadsafe(self._out.put_nowait, (self.index, piece))

    def deliver(self, made: list[int], tokenizer: Any, ends: set[int]) -> None:
        """The tokens so far, the last one new."""
        self.made = made
        if made[-1] in ends:
            made, self.reason = made[:-1], "stop"
        elif len(made) == self.wish.limit:
            self.reason = "length"
        text = tokenizer.decode(made, skip_special_tokens=True)
        found = [place for stop in self.wish.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.reason = text[: min(found)], "stop"
        ready = len(text) if self.reason else self._certain(text)
        if ready > self._sent:
            self.put(text[self._sent : ready])
            self._sent = ready
        if self.reason:
            self.put(None)

    def _certain(self, text: str) -> int:
        """How much of a text stays: a character that is not whole yet, and what may begin a stop, wait."""
        if text.endswith("\ufffd"):
            return self._sent
        begun = [n for stop in self.wish.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - max(begun, default=0)


class Answers:
    """What comes of a request: an answer for each prompt, or several."""

    def __init__(self, prompts: list[list[int]], wish: Wish, each: int) -> None:
        self._out: asyncio.Queue[Piece] = asyncio.Queue()
        rows = [prompt for prompt in prompts for _ in range(each)]
        self.jobs = [Job(tokens, wish, index, self._out) for index, tokens in enumerate(rows)]
        self.asked = sum(map(len, prompts))

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Text as it comes, and of which answer; an empty one is its end."""
        left = len(self.jobs)
        try:
            while left:
                index, piece = await self._out.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece is None
                yield index, piece or ""
        finally:
            for job in self.jobs:
                job.reason = job.reason or "cancelled"  # The client has gone: the row ends at its next token.

    def usage(self) -> dict[str, int]:
        made = sum(len(job.made) for job in self.jobs)
        return {"prompt_tokens": self.asked, "completion_tokens": made, "total_tokens": self.asked + made}


class Draws(LogitsProcessor):
    """Draws every row's next token as its request wants it; what is left is certain."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = [_drawn(row, job) for row, job in zip(scores, self.jobs, strict=True)]
        index = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, index, 0.0)


def _drawn(scores: torch.Tensor, job: Job) -> int:
    if job.wish.temperature == 0:
        return int(scores.argmax())
    share, order = (scores.float() / max(job.wish.temperature, 1e-3)).softmax(0).cpu().sort(descending=True)
    if job.wish.top_p < 1:
        share = share * (share.cumsum(0) - share < job.wish.top_p)  # The first is always drawn from.
    return int(order[torch.multinomial(share, 1, generator=job.random)])


class Readers(StoppingCriteria):
    """Hands every row's new token to its reader, and ends the rows that are done."""

    def __init__(self, jobs: list[Job], tokenizer: Any, width: int, ends: set[int]) -> None:
        self.jobs, self.tokenizer, self.width, self.ends = jobs, tokenizer, width, ends

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        for job, made in zip(self.jobs, ids[:, self.width :].tolist(), strict=True):
            if job.reason is None:
                job.deliver(made, self.tokenizer, self.ends)
        return torch.tensor([job.reason is not None for job in self.jobs], device=ids.device)


class Engine:
    """A base with its bank, and the requests that wait for them."""

    def __init__(self, model: Any, tokenizer: Any, adapters: Path) -> None:
        self.model, self.tokenizer, self.bank = model.eval(), tokenizer, hs.AdapterBank(model)
        self.room: int = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.pad = next(t for t in (tokenizer.pad_token_id, *self.ends, 0) if t is not None)
        self.waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        for folder in sorted(adapters.iterdir()):
            if (folder / "adapter_config.json").is_file():
                self.bank.load(folder.name, folder)

    def work(self) -> None:
        """Batch after batch, until a None comes."""
        held: Job | None = None
        while (first := held or self.waiting.get()) is not None:
            jobs, held = self._together(first)
            try:
                self._generate([job for job in jobs if self._is_there(job)])
            except Exception as error:  # The clients are told, and the thread lives on.
                logging.getLogger("uvicorn.error").exception("a batch failed")
                for job in jobs:
                    job.put(error)

    def _together(self, first: Job) -> tuple[list[Job], Job | None]:
        """A batch that the model has room for, and a job that did not fit."""
        time.sleep(WAIT)
        jobs = [first]
        while len(jobs) < MAX_BATCH and not self.waiting.empty():
            job = self.waiting.get()
            if job is None:
                self.waiting.put(None)
                break
            both = [*jobs, job]
            if max(len(j.tokens) for j in both) + max(j.wish.limit for j in both) > self.room:
                return jobs, job
            jobs = both
        return jobs, None

    def _is_there(self, job: Job) -> bool:
        there = job.wish.adapter is None or job.wish.adapter in self.bank
        if not there:
            job.put(hs.HeadstartError(f"the adapter {job.wish.adapter!r} was removed"))
        return there

    def _generate(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        width = max(len(job.tokens) for job in jobs)
        short = [width - len(job.tokens) for job in jobs]
        ids = torch.tensor([[self.pad] * n + job.tokens for n, job in zip(short, jobs, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in short])
        device = self.model.device
        self.bank.generate(
            [job.wish.adapter for job in jobs],
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(job.wish.limit for job in jobs),
            do_sample=False,  # It takes what was drawn.
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([Draws(jobs)]),
            stopping_criteria=StoppingCriteriaList([Readers(jobs, self.tokenizer, width, self.ends)]),
        )
