"""A first fine-tune of a real model on data that every machine has, with the proof that what it printed is true."""

from __future__ import annotations

import textwrap
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
    "dtype": "auto",
    "steps": 60,
    "batch_size": 8,
    "learning_rate": 1.5e-3,
    "warmup": 0.1,
    "max_length": 256,
    "eval_rows": 64,
    "eval_every": 20,
    "save_every": 20,
}
SHOWN = 4


class Samples(TrainerCallback):
    """Lets the model describe a few held-out functions before the first step and after the last."""

    def __init__(self, pairs: list[docstrings.Pair], tokenizer: PreTrainedTokenizerBase) -> None:
        self.pairs, self.tokenizer = pairs, tokenizer
        self.before: list[str] = []
        self.after: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = [describe(model, self.tokenizer, pair) for pair in self.pairs]

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after = [describe(model, self.tokenizer, pair) for pair in self.pairs]


def run_demo(model: str, output: str, threads: int | None = None) -> Finished:
    """Train, show the model before and after, then load the adapter with PEFT alone and measure it again.

    Raises:
        HeadstartError: also if PEFT alone does not measure what was printed.
    """
    config = resolve({**SETTINGS, "model": model, "output": output, "threads": threads})
    source = models.find(model)
    print(f"model: {source.name}")
    place = models.unpacked(source)
    samples = Samples(_shown(), models.tokenizer_of(place))
    finished = run(config, watchers=[samples])
    for pair, before, after in zip(samples.pairs, samples.before, samples.after, strict=True):
        print(f"\n{textwrap.indent(pair.source, '    ')}")
        print(f"  before  {before}\n  after   {after}\n  Python  {pair.sentence}")
    print(f"\n{finished}")
    again = measured_by_peft(config, place)
    print(f"loaded again with PEFT alone: held-out loss {again:.3f}")
    if finished.held_out_after is None or abs(again - finished.held_out_after) > 0.01 * again:
        raise HeadstartError(
            f"PEFT measures {again:.4f}, training measured {finished.held_out_after}: please report it"
        )
    return finished


def measured_by_peft(config: RunConfig, source: models.Source) -> float:
    """The held-out loss of the written adapter on a fresh base, with plain PEFT."""
    from peft import PeftModel

    tokenizer = models.tokenizer_of(source)
    base = models.load(source, config.dtype)
    model = PeftModel.from_pretrained(base, str(Folder(Path(config.output)).adapter))
    return float(build_trainer(model, tokenizer, data.prepare(config, tokenizer), config).evaluate()["eval_loss"])


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
        **prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    model.train(training)
    text = tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).strip().split("\n")[0]
