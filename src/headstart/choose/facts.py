"""What an advice is based on, and the conditions that its rules name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headstart.choose import costs
from headstart.choose.costs import Start
from headstart.choose.estimate import Estimate, predict
from headstart.choose.samples import Sample
from headstart.choose.setting import Setting
from headstart.choose.shapes import Outline
from headstart.errors import BadOption, HeadstartError, nearest

FEW_STEPS = 1000
LITTLE_DATA = 200_000  # tokens
HIGH_RANK = 128
VERY_LARGE = 30e9  # parameters, from which PiSSA's decompositions take hours on a CPU
SWEEP = 4  # rates that make a sweep
DEFAULT_STEPS_BATCH = 8
SHARE = 0.02  # of all parameters, that train at most where a rank is chosen for the user
SMALL_RANK = 8  # of plain LoRA, below which its layers hold little


@dataclass(frozen=True)
class Engine:
    """What an engine that serves adapters can take.

    Attributes:
        rank: the largest it takes, None where there is no limit. reads_rslora: whether it scales by α/√r then.
        whole_alpha: whether α must be an integer. note: what to tell.
    """

    rank: int | None = None
    reads_rslora: bool = True
    whole_alpha: bool = False
    note: str = ""


# Read from the engines' sources, November 2026.
ENGINES: Mapping[str, Engine] = {
    "peft": Engine(),
    "vllm": Engine(512, note="start vLLM with --max-lora-rank {rank}: its default is 16"),
    "sglang": Engine(None, reads_rslora=False, note="start SGLang with --max-lora-rank {rank}"),
    "lorax": Engine(None, reads_rslora=True),
    "llama.cpp": Engine(None, reads_rslora=False),
    "ollama": Engine(None, reads_rslora=False, whole_alpha=True, note="Ollama takes merged models alone since 0.34.1"),
    "mlx": Engine(None, reads_rslora=False),
}


@dataclass(frozen=True)
class Facts:
    """All that a rule may look at.

    Attributes:
        outline: the model. setting: batch, length and dtype of what is planned; its r where `rank_given`.
        memory: the limit in bytes. quantised: "4bit" or "8bit". data: what a look at it showed.
        steps: of the run. preserve: whether there is data of what is not to be forgotten.
        serve: the engine. sweep: how many runs one can afford. trainable: numbers that may train at most.
    """

    outline: Outline
    setting: Setting = Setting()  # noqa: RUF009 (frozen)
    memory: int | None = None
    quantised: str | None = None
    data: Sample | None = None
    steps: int | None = None
    preserve: bool = False
    serve: str | None = None
    sweep: int = 1
    trainable: int | None = None
    rank_given: bool = False

    def __post_init__(self) -> None:
        if self.serve is not None and self.serve not in ENGINES:
            raise BadOption(f"no engine is called {self.serve!r}{nearest(self.serve, ENGINES)} ({', '.join(ENGINES)})")

    @property
    def engine(self) -> Engine | None:
        return None if self.serve is None else ENGINES[self.serve]

    @property
    def planned_steps(self) -> int | None:
        """The user's, or one pass over the data."""
        if self.steps is not None or self.data is None or self.data.rows is None:
            return self.steps
        return max(1, round(self.data.rows / self.setting.batch_size / self.setting.gradient_accumulation))

    @property
    def budget(self) -> float:
        """Numbers that may train: the user's word, and a share of the model where the rank is ours to choose."""
        share = math.inf if self.rank_given else SHARE * self.outline.parameters
        return share if self.trainable is None else min(share, self.trainable)

    @property
    def plain_rank_fits(self) -> bool:
        """Whether plain LoRA of the rank given, or of a small one, stays within the budget."""
        rank = self.setting.r if self.rank_given else SMALL_RANK
        chosen = self.outline.chosen(self.setting.target_modules, self.setting.exclude_modules)
        return rank * sum((matrix.m + matrix.n) * matrix.count for matrix in chosen) <= self.budget

    def with_(self, **changes: object) -> Setting:
        return dataclasses.replace(self.setting, quantised=self.quantised, **changes)  # type: ignore[arg-type]

    def of(self, init: str, **changes: object) -> Estimate:
        """The memory that a start takes under these facts."""
        return predict(self.outline, self.with_(init=init, **changes))

    def fits(self, init: str) -> bool:
        """Whether its pass over the data fits the memory, at the smallest batch and rank."""
        if self.memory is None:
            return True
        small = {"batch_size": 1, "gradient_checkpointing": True, "r": self.setting.r if self.rank_given else 8}
        try:
            return self.of(init, **small).memory.init <= self.memory
        except HeadstartError:  # A rank that does not fit a weight: its own message comes when it is chosen.
            return True


CONDITIONS: Mapping[str, Callable[[Facts], bool]] = {
    "data": lambda facts: facts.data is not None,
    "no data": lambda facts: facts.data is None,
    "little data": lambda facts: (
        facts.data is not None and facts.data.total is not None and facts.data.total < LITTLE_DATA
    ),
    "few steps": lambda facts: facts.planned_steps is not None and facts.planned_steps <= FEW_STEPS,
    "can sweep rates": lambda facts: facts.sweep >= SWEEP,
    "to preserve": lambda facts: facts.preserve,
    "nothing to preserve": lambda facts: not facts.preserve,
    "4-bit": lambda facts: facts.quantised == "4bit",
    "the checkpoint is quantised": lambda facts: facts.outline.quantised is not None,
    "not quantised": lambda facts: facts.quantised is None,
    "served by an engine": lambda facts: facts.serve not in (None, "peft"),
    "not served by an engine": lambda facts: facts.serve in (None, "peft"),
    "engine misreads rsLoRA": lambda facts: facts.engine is not None and not facts.engine.reads_rslora,
    "doubled rank is not served": lambda facts: (
        facts.engine is not None and facts.engine.rank is not None and 2 * facts.setting.r > facts.engine.rank
    ),
    "gradients fit": lambda facts: facts.fits("lora_one"),
    "gradients do not fit": lambda facts: not facts.fits("lora_one"),
    "inputs fit": lambda facts: facts.fits("lora_null"),
    "inputs do not fit": lambda facts: not facts.fits("lora_null"),
    "inputs and gradients fit": lambda facts: facts.fits("kfac"),
    "very large": lambda facts: facts.outline.parameters >= VERY_LARGE,
    "not very large": lambda facts: facts.outline.parameters < VERY_LARGE,
    "rank given": lambda facts: facts.rank_given,
    "high rank": lambda facts: facts.rank_given and facts.setting.r >= HIGH_RANK,
    "convolutions": lambda facts: facts.outline.convolutional,
    "experts": lambda facts: any(matrix.count > 1 and not matrix.convolution for matrix in facts.outline.matrices),
    "a small rank is over the budget": lambda facts: not facts.plain_rank_fits,
}

PROPERTIES: Mapping[str, Callable[[Start], bool]] = {
    "look at data": lambda start: bool(start.needs),
    "look at gradients": lambda start: start.looks_at_gradients,
    "look at inputs": lambda start: bool(set(start.needs) & set(costs.INPUTS)),
    "anchored": lambda start: start.anchored,
}
