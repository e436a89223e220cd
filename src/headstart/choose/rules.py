"""What is advised when, as a table: (when, choose, because, source, confidence).

Each rule answers one question. Of those whose conditions hold, the first one answers it; for the init all of them do,
in this order, which is the ranking. A start that another rule rules out is taken off it, with that rule's reason. The
conditions are named in `facts.py`. To change the advice, change a row; the tests walk the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Question = Literal["init", "rank", "scaling", "targets", "decay"]
Confidence = Literal["high", "medium", "low"]

LR_MATTERS = "arXiv 2602.04998"
UNIFIED = "arXiv 2601.22708"
REGRET = "Schulman et al. (2025), LoRA Without Regret"
LORA_ONE = "arXiv 2502.01235"
PEFT_TABLE = "PEFT's method_comparison, Llama-3.2-3B on MetaMathQA"
FORGETTING = "an unreviewed log: Llama-2-7B and Qwen2.5-7B, 8 adapters × 7 rates, one seed"
ENGINES = "the engines' own sources, November 2026"
OURS = "how headstart works"
GAP = "headstart's own runs, docs/gap.md"

TUNED = "differences between inits at tuned rates are usually under two points; spend the sweep on the rate"
TUNED_SOURCE = (
    f"{LR_MATTERS}: peaks of ten methods within 0.4 to 1.8 points, their best rates up to 32× apart; {UNIFIED}"
)


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        question: what it answers. when: names of conditions that all hold. choose: the answer.
        because, source, confidence: said to the user. fields: of the config, that go with it.
    """

    question: Question
    when: tuple[str, ...]
    choose: Any
    because: str
    source: str
    confidence: Confidence
    fields: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Exclusion:
    """One row of what is ruled out.

    Attributes:
        when: names of conditions that all hold.
        starts: names; or a property of starts, named in `facts.PROPERTIES`.
    """

    when: tuple[str, ...]
    starts: tuple[str, ...] | str
    because: str
    source: str


def _rule(question: Question, when: str, choose: Any, because: str, source: str, confidence: Confidence,
          **fields: Any) -> Rule:  # fmt: skip
    return Rule(question, _names(when), choose, because, source, confidence, tuple(fields.items()))


def _exclusion(when: str, starts: str | tuple[str, ...], because: str, source: str) -> Exclusion:
    return Exclusion(_names(when), starts, because, source)


def _names(when: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in when.split(",")) if when else ()


# fmt: off
RULES: tuple[Rule, ...] = (
    # ------------------------------------------------------------------------------------------------ init
    _rule("init", "a small rank is over the budget, nothing to preserve, data, inputs and gradients fit", "kfac",
          "plain LoRA of a useful rank is over what may train: r² numbers between frozen directions buy ten times the "
          "rank, along the inputs' and the output gradients' main axes", GAP, "low"),
    _rule("init", "a small rank is over the budget, nothing to preserve, data, gradients fit", "lora_sb",
          "the same between the directions of one mean gradient, which take less memory to find",
          f"arXiv 2411.19557; {GAP}: worse than those axes", "low"),
    _rule("init", "to preserve, inputs fit", "lora_null",
          "a frozen A that what is to be preserved hardly excites: the one start whose structure protects it",
          f"arXiv 2503.02659; {FORGETTING}", "low", init_options={"mode": "frozen"}, calibration="{preserve}"),
    _rule("init", "to preserve", "kaiming",
          "what is forgotten follows ‖ΔW‖ whatever the start: plain LoRA, decayed and stopped early, reached the same",
          FORGETTING, "medium"),
    _rule("init", "to preserve, data, inputs fit", "sc_lora",
          "directions that the data uses and what is to be preserved does not; protects what the second data shows",
          "arXiv 2505.23724, one paper", "low", preserve="{preserve}"),
    _rule("init", "4-bit, not served by an engine", "qpissa",
          "the factors take up a part of what quantising loses; `remaining` in the report says how much, by layer",
          "arXiv 2404.02948; issue yxli2123/LoftQ#25 finds cases that get worse", "medium"),
    _rule("init", "can sweep rates", "kaiming",
          f"do not bother with the init: plain LoRA at a tuned rate; {TUNED}", TUNED_SOURCE, "high"),
    _rule("init", "few steps, data, gradients fit", "lora_one",
          "a short run at a rate that is not tuned: a first step along the gradient of this data is worth most there",
          f"{LORA_ONE}, its rate tuned by its authors, two runs; no independent study", "medium"),
    _rule("init", "few steps, no data, not very large", "pissa",
          "a short run and no data to look at: the largest directions learn first, at a tenth of plain LoRA's rate",
          f"arXiv 2404.02948; {LR_MATTERS}", "medium"),
    _rule("init", "few steps, very large", "olora",
          "as PiSSA, for one thin QR of a few columns of each matrix instead of its leading directions",
          f"arXiv 2406.01775; {LR_MATTERS}", "low"),
    _rule("init", "high rank", "pissa",
          "from rank 128 on PiSSA was 0.2 to 0.3 points above plain LoRA, and gradient starts below it",
          f"{LR_MATTERS}, Gemma-3-1B, r = 4 to 256", "low"),
    _rule("init", "", "kaiming",
          f"do not bother with the init: plain LoRA at a tuned rate; {TUNED}", TUNED_SOURCE, "high"),
    _rule("init", "data, inputs fit", "eva",
          "the inputs' main directions; its ranks, shared out anew, hold as much in fewer parameters",
          "arXiv 2410.07170, one group, many tasks", "low"),
    # ------------------------------------------------------------------------------------------------ rank
    _rule("rank", "rank given", "{r}", "you chose it", "your word", "high"),
    _rule("rank", "a small rank is over the budget", 128,
          "as much as may train: two per cent of the model, or what was named", GAP, "medium"),
    _rule("rank", "little data", 16, "the data says less than a larger adapter could hold",
          f"{REGRET}: capacity is needed where the data exceeds it", "medium"),
    _rule("rank", "", 64, "rank is cheap, and was worth more than any init where rsLoRA scales it",
          f"{PEFT_TABLE}: rsLoRA r = 64 51.3, r = 32 47.8; {REGRET}", "medium"),
    # ------------------------------------------------------------------------------------------------ scaling
    _rule("scaling", "engine misreads rsLoRA", "plain",
          "s as rsLoRA has it, written as α = s·r: this engine computes α/r whatever the file says",
          f"{ENGINES}; sglang#40835", "high"),
    _rule("scaling", "", "rslora", "s = α/√r keeps the step of every rank alike; α = 16, the usual choice",
          f"arXiv 2312.03732; {PEFT_TABLE}", "medium"),
    # ------------------------------------------------------------------------------------------------ targets
    _rule("targets", "experts", "all-linear",
          "attention alone: experts are bare parameters, and adapters on all of them many times as large",
          OURS, "medium"),
    _rule("targets", "convolutions", "every matrix",
          "most of the model is convolutions: they and every Linear, but what has no room for the rank", GAP, "medium"),
    _rule("targets", "", "all-linear", "every Linear, the MLP's too: attention alone falls short at equal parameters",
          f"{REGRET}; {PEFT_TABLE}: MLP alone at r = 10 49.4", "high"),
    # ------------------------------------------------------------------------------------------------ decay
    _rule("decay", "to preserve", 0.3, "it shrinks ‖ΔW‖, which forgetting follows", FORGETTING, "medium"),
    _rule("decay", "", 0.0, "nothing asks for more", OURS, "medium"),
)

EXCLUSIONS: tuple[Exclusion, ...] = (
    _exclusion("no data", "look at data", "no data was given to look at (--data)", OURS),
    _exclusion("nothing to preserve", ("sc_lora", "lora_null"), "made to preserve, and nothing was named (--preserve)",
               OURS),
    _exclusion("not quantised", ("loftq", "qpissa"), "replace the base by a quantised one, which nobody asked for",
               OURS),
    _exclusion("the checkpoint is quantised", ("loftq", "qpissa"),
               "make up for what quantising lost, which only the float weights tell: name their folder, "
               "init_options={'original': …}",
               OURS),
    _exclusion("served by an engine", ("loftq", "qpissa"),
               "right only on the quantised base that they made, which engines do not load", ENGINES),
    _exclusion("gradients do not fit", "look at gradients", "the pass for their gradients does not fit the memory",
               OURS),
    _exclusion("inputs do not fit", "look at inputs", "the second moments of the inputs do not fit the memory", OURS),
    _exclusion("high rank", ("lora_one", "lora_ga"), "below PiSSA and plain LoRA at rank 128",
               f"{LR_MATTERS}; TaRA's tables"),
    _exclusion("doubled rank is not served", "anchored",
               "exported as a plain LoRA it has twice the rank, more than this engine takes", ENGINES),
    _exclusion("", ("lora_ga",), "its gain was the rate's: tuned LoRA 87.88, LoRA-GA 87.77 on T5-base and GLUE",
               "arXiv 2505.12455 (AltLoRA)"),
    _exclusion("", ("milora", "init_ab"), "no gain over plain LoRA once both rates are tuned", LR_MATTERS),
    _exclusion("nothing to preserve", ("mica",), "below plain LoRA where only learning counts: 43.1 to 47.8",
               PEFT_TABLE),
    _exclusion("", ("random",), "moves the function by noise: for tests", OURS),
    _exclusion("", ("gaussian", "normal", "orthogonal", "loram"),
               "noise of another size or shape: a rate that fits does as much", "arXiv 2507.06558; strategies page"),
    _exclusion("", ("corda", "tara", "gora", "lora_da"),
               "published by its authors alone, at rates tuned by nobody else", "the papers on the strategies page"),
)
# fmt: on
