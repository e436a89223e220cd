"""The model's own thread: requests that wait together become the rows of one generation, each with its adapter.

A batch runs until its longest answer ends; what arrives meanwhile waits for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import headstart as hs

MAX_BATCH, WAIT = 32, 0.005  # rows, and seconds that the first of a batch waits for company


class Job:
    """A request on its way.

    Attributes:
        tokens: of the prompt; limit: of new ones; adapter: None for the base.
        made: the answer's tokens; reason: why it ended, as OpenAI calls it.
    """

    def __init__(self, tokens: list[int], limit: int, temperature: float, adapter: str | None) -> None:
        self.tokens, self.limit, self.temperature, self.adapter = tokens, limit, temperature, adapter
        self.made: list[int] = []
        self.reason: str | None = None
        self._sent = 0
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def put(self, piece: str | Exception | None) -> None:
        """From the engine's thread: some text, what went wrong, or the end."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def deliver(self, made: list[int], tokenizer: Any, ends: set[int]) -> None:
        """The tokens so far, the last one new."""
        if made[-1] in ends:
            made, self.reason = made[:-1], "stop"
        elif len(made) == self.limit:
            self.reason = "length"
        self.made = made
        text = tokenizer.decode(made, skip_special_tokens=True)
        if self.reason or not text.endswith("\ufffd"):  # A character that is not whole yet waits for its other bytes.
            self.put(text[self._sent :])
            self._sent = len(text)
        if self.reason:
            self.put(None)

    async def text(self) -> AsyncIterator[str]:
        """The answer as it comes."""
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.reason = self.reason or "cancelled"  # The client has gone: the row ends at its next token.


class Temperatures(LogitsProcessor):
    """A temperature for each row; 0 is greedy."""

    def __init__(self, jobs: list[Job], device: torch.device) -> None:
        self.heat = torch.tensor([[job.temperature] for job in jobs], device=device)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        greedy = torch.full_like(scores, -torch.inf).scatter_(1, scores.argmax(1, keepdim=True), 0.0)
        return torch.where(self.heat == 0, greedy, scores / self.heat.clamp_min(1e-3))


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
            if max(len(j.tokens) for j in both) + max(j.limit for j in both) > self.room:
                return jobs, job
            jobs = both
        return jobs, None

    def _is_there(self, job: Job) -> bool:
        there = job.adapter is None or job.adapter in self.bank
        if not there:
            job.put(hs.HeadstartError(f"the adapter {job.adapter!r} was removed"))
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
            [job.adapter for job in jobs],
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(job.limit for job in jobs),
            do_sample=any(job.temperature for job in jobs),
            temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([Temperatures(jobs, device)]),
            stopping_criteria=StoppingCriteriaList([Readers(jobs, self.tokenizer, width, self.ends)]),
        )  # fmt: skip
