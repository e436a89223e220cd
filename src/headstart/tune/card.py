"""The model card beside an adapter: what it is, what was measured, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headstart.tune.models import Source
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from headstart.tune.train import Finished

CARD = """---
{metadata}
---

# {name}: LoRA on {base}

Rank {config.r}, started with `{config.init}`, on `{targets}`; {finished.trainable:,} trainable parameters.
{advice}Trained with headstart {version} on `{config.data}`: {finished.steps} steps, {finished.tokens:,} tokens, \
peak learning rate {config.learning_rate}.

| loss, nats a token | |
|---|---|
{losses}

## Load it with PEFT alone

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

or with headstart: `headstart.load(base, "path/to/this/folder")`.

## How it was started

```
{start}
```

## The run

```yaml
{recipe}```
"""


def write(config: RunConfig, source: Source, finished: Finished, start: str) -> str:
    """The text of README.md.

    Args:
        start: the init report, in words.
    """
    from huggingface_hub import ModelCardData

    import headstart

    metadata = ModelCardData(
        base_model=source.name if source.on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "headstart", "sft", *([f"base_model:adapter:{source.name}"] if source.on_hub else [])],
        datasets=[config.data] if _is_hub_dataset(config.data) else None,
    )
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=Path(config.output).name,
        base=source.name,
        config=config,
        targets=targets,
        finished=finished,
        version=headstart.__version__,
        losses=_losses(finished),
        advice="" if config.advice is None else f"Left to headstart: {config.advice}.\n\n",
        start=start,
        recipe=config.to_yaml(),
    )


def _losses(finished: Finished) -> str:
    rows = {
        "training, last log": finished.loss,
        "held out, before": finished.held_out_before,
        "held out, after": finished.held_out_after,
    }
    return "\n".join(f"| {name} | {loss:.4f} |" for name, loss in rows.items() if loss is not None)


def _is_hub_dataset(data: str) -> bool:
    return data.count("/") <= 1 and not Path(data).suffix and not Path(data).exists() and data != "stdlib"
