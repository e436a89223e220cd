"""A first fine-tune of a real model on data that every machine has, with the proof that what it printed is true."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from headstart.errors import HeadstartError
from headstart.tune import data, docstrings, models
from headstart.tune.folder import Folder
from headstart.tune.recipe import RunConfig, resolve
from headstart.tune.train import Finished, run
from headstart.tune.trainer import build_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS: dict[str, Any] = {
    "data": data.EMBEDDED,
    "init": "kaiming",
    "r": 16,
    "lora_alpha": 16,
    "use_rslora": True,
    "steps": 40,
    "batch_size": 1,
    "packing": True,  # about six functions a row, and no padding to compute on
    "max_length": 512,
    "learning_rate": 1.5e-3,
    "warmup": 0.1,
    "eval_rows": 40,
    "eval_every": 20,
    "save_every": 20,
}
SHOWN = 4


class Samples(TrainerCallback):
    """Lets the base model, and after the last step the adapted one, describe a few held-out functions."""

    def __init__(self, pairs: Sequence[docstrings.Pair], tokenizer: PreTrainedTokenizerBase) -> None:
        self.pairs, self.tokenizer = pairs, tokenizer
        self.before: list[str] = []
        self.after: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with model.disable_adapter():  # Also in a resumed run, before means before the first step.
            self.before = [describe(model, self.tokenizer, pair) for pair in self.pairs]

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after = [describe(model, self.tokenizer, pair) for pair in self.pairs]


def run_demo(model: str, output: str | None = None, threads: int | None = None) -> Finished:
    """Train, show the model before and after, then load the adapter with PEFT alone and measure it again.

    Args:
        model: what `headstart tune --model` takes.
        output: the folder; left out, `demo-run`, or `demo-run-2` where that is finished, and so on.
        threads: of the CPU.

    Raises:
        HeadstartError: also if PEFT alone does not measure what was printed.
    """
    config = resolve({**SETTINGS, "model": model, "output": output or _fresh_folder(), "threads": threads})
    source = models.find(model)
    print(f"model: {source.name}{' (its GGUF is unpacked once: half a minute)' if source.gguf else ''}", flush=True)
    source = models.unpacked(source)
    samples = Samples(_shown(), models.tokenizer_of(source))
    finished = run(config, watchers=[samples])
    for pair, before, after in zip(samples.pairs, samples.before, samples.after, strict=True):
        print(f"\n{textwrap.indent(pair.source, '    ')}\n")
        print(f"  before  {before}\n  after   {after}\n  Python  {pair.sentence}")
    print(f"\n{finished}")
    again = measured_by_peft(config, source)
    print(f"loaded again with PEFT alone: held-out loss {again:.3f}")
    if finished.held_out_after is None or abs(again - finished.held_out_after) > 0.01 * again:
        raise HeadstartError(
            f"PEFT measures {again:.4f}, training measured {finished.held_out_after}: please report it"
        )
    print(f"your own data: headstart tune --model {model} --data FILE.jsonl")
    return finished


def _fresh_folder() -> str:
    names = (f"demo-run{suffix}" for suffix in chain([""], (f"-{number}" for number in count(2))))
    return next(name for name in names if not Folder(Path(name)).adapter.exists())


def measured_by_peft(config: RunConfig, source: models.Source) -> float:
    """The held-out loss of the written adapter on a fresh base, with plain PEFT."""
    from peft import PeftModel

    tokenizer = models.tokenizer_of(source)
    base = models.load(source, Folder(Path(config.output)).recorded().dtype)
    model = PeftModel.from_pretrained(base, str(Folder(Path(config.output)).adapter))
    rows = data.prepare(config, tokenizer)
    rows = replace(rows, train=rows.train.select(range(1)))  # The trainer wants some, and only evaluates.
    return float(build_trainer(model, tokenizer, rows, config).evaluate()["eval_loss"])


def _shown() -> list[docstrings.Pair]:
    """Short held-out functions of different modules."""
    chosen: dict[str, docstrings.Pair] = {}
    for pair in docstrings.pairs():
        if docstrings.is_held_out(pair.module) and 120 <= len(pair.source) <= 260:
            chosen.setdefault(pair.module, pair)
    return list(chosen.values())[:SHOWN]


@torch.no_grad()
def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pair: docstrings.Pair) -> str:
    """The first line that the model goes on with, greedily."""
    training = model.training
    model.eval()
    prompt = tokenizer(docstrings.QUESTION.format(source=pair.source), return_tensors="pt").to(model.device)
    found = model.generate(  # type: ignore[operator]
        **prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    model.train(training)
    text = tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip().split("\n")[0].lstrip("# ")
