"""The advice: a walk over its table, and what it says under the facts that people have."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.choose import costs
from headstart.choose.advise import advise, advised, answering, excluded
from headstart.choose.compare import _configs
from headstart.choose.facts import CONDITIONS, ENGINES, PROPERTIES, SHARE, Facts
from headstart.choose.outlines import outline_of
from headstart.choose.rate import RATIOS, rate_of
from headstart.choose.recommendation import Advice
from headstart.choose.rules import EXCLUSIONS, RULES, TUNED, Exclusion, Rule
from headstart.choose.samples import Sample, look
from headstart.choose.setting import Setting
from headstart.errors import (
    BadOption,
    BadRank,
    CalibrationError,
    DataError,
    FileError,
    HeadstartError,
    NoTarget,
    UnknownField,
)

LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2,
    "num_attention_heads": 16, "vocab_size": 32000, "dtype": "bfloat16", "max_position_embeddings": 2048,
}  # fmt: skip
LARGE = {
    **LLAMA,
    "hidden_size": 16384,
    "intermediate_size": 200_000,
    "num_attention_heads": 128,
    "num_hidden_layers": 4,
}
MIXTURE = {
    **LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8,
}  # fmt: skip
SOME = Sample("some.jsonl", 5000, 300.0, 400)
FEW = Sample("few.jsonl", 200, 100.0, 150)


class Convolutions(nn.Module):
    """Three of them, and a small head."""

    def __init__(self) -> None:
        super().__init__()
        sides = (1, 32, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(n, m, 3, padding=1) for n, m in itertools.pairwise(sides))
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def small_decoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def grid() -> Iterator[Facts]:
    """Facts that people may have, in all combinations that differ in what a rule looks at."""
    for config, sweeps in ((LLAMA, (1, 4)), (LARGE, (1,)), (MIXTURE, (1,))):
        outline = outline_of(config)
        choices: dict[str, tuple[Any, ...]] = {
            "memory": (None, 10**9, 5 * 10**8),
            "quantised": (None, "4bit"),
            "data": (None, SOME, FEW),
            "steps": (100, 5000),
            "preserve": (False, True),
            "serve": (None, "vllm", "sglang"),
            "sweep": sweeps,
        }
        for values in itertools.product(*choices.values()):
            yield Facts(outline, **dict(zip(choices, values, strict=True)))
        for r, trainable, serve in itertools.product((16, 128, 512), (None, 1000), (None, "vllm")):
            setting = Setting(r=r)
            yield Facts(outline, setting, data=SOME, steps=100, trainable=trainable, rank_given=True, serve=serve)
            yield Facts(outline, setting, data=None, steps=5000, trainable=trainable, rank_given=True, serve=serve)
    for model in (small_decoder(), Convolutions()):
        outline = outline_of(model)
        names = [m.name for m in outline.matrices]
        for memory, data, preserve in itertools.product((None, 10**9), (None, SOME, FEW), (False, True)):
            yield Facts(outline, Setting(target_modules=names), memory, data=data, steps=100, preserve=preserve)
    yield Facts(dataclasses.replace(outline_of(LLAMA), quantised="4bit"), quantised="4bit", data=SOME, steps=5000)
    # The second moments of a wide layer's inputs take more than its gradient does.
    yield Facts(outline_of(LARGE), memory=2 * 10**11, data=SOME, steps=100, trainable=1000)


@pytest.fixture(scope="module")
def cases() -> list[tuple[Facts, frozenset[str]]]:
    """The grid, and which conditions hold; those that ask whether a pass fits are asked once for each model."""
    found = []
    for facts in grid():
        found.append((facts, frozenset(name for name, holds in CONDITIONS.items() if holds(facts))))
    return found


# --- auto


@pytest.fixture
def digits() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(5, (16,), generator=generator) for _ in range(18)]
    return [(torch.randn(16, 1, 8, 8, generator=generator) + y[:, None, None, None], y) for y in labels]


def label_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_auto_chooses_installs_and_finds_the_rate(digits: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    before = label_loss(model, digits[0]).item()
    found = hs.auto(model, digits, loss=label_loss, steps=40, exclude_modules=["head"])
    trained, _ = found.adapter.count()
    base = sum(p.numel() for p in Convolutions().parameters())
    assert found.config.init_lora_weights == "kfac"
    assert set(found.adapter.layers()) == {"convs.1", "convs.2"}  # nine numbers wide, the first has no room
    assert 0.015 * base < trained <= SHARE * base
    assert label_loss(model, digits[0]).item() == pytest.approx(before, rel=1e-5)  # a core of zeros
    assert (found.steps, set(found.seconds)) == (8 + 20, {"advice", "start", "rate"})
    assert "3 trials of 6 steps" in found.rate.reason
    for word in ("kfac", "because", "cost", "28 training steps", found.rate.reason):
        assert word in str(found)
    optimizer = torch.optim.AdamW(found.adapter.parameters(), lr=found.rate)
    for batch in digits:
        loss = label_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert label_loss(model, digits[0]).item() < before


def test_auto_leaves_the_model_as_it_was_where_it_fails(digits: list[tuple[Tensor, Tensor]]) -> None:
    model = Convolutions()
    names = [name for name, _ in model.named_modules()]

    def spoilt(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        trial = any("lora_" in name for name, _ in model.named_parameters())
        return label_loss(model, batch) * (math.nan if trial else 1.0)

    with pytest.raises(CalibrationError, match="not finite"):
        hs.auto(model, digits, loss=spoilt, steps=40)
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(BadOption, match="iterable of batches"):
        hs.auto(model, "data.jsonl")
    with pytest.raises(BadOption, match="no batch"):
        hs.auto(model, [], loss=label_loss)
    unread = iter(digits)
    with pytest.raises(BadOption, match=r"trials is 5: two trials .* pass \d+ or more"):
        hs.auto(model, unread, loss=label_loss, trials=5)
    assert next(unread) is digits[0]


def test_auto_where_plain_ranks_fit_takes_the_table_s_next_answer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024))
    batches = [torch.randn(64, 1024) for _ in range(10)]
    found = hs.auto(model, batches, loss=lambda model, x: model(x).square().mean(), steps=50, trials=0)
    assert (found.config.init_lora_weights, found.config.r) == ("lora_one", 8)
    assert found.rate == found.adapter.learning_rate(steps=50)
    hs.remove(model)
    found = hs.auto(model, batches, loss=lambda model, x: model(x).square().mean(), steps=50, trials=0, sweep=8)
    assert (found.config.init_lora_weights, found.steps) == ("kaiming", 0)


def test_compare_takes_auto_as_an_arm_and_a_list_of_arms(digits: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    arms: dict[str, Any] = {"plain": hs.LoraConfig(r=4, target_modules=["1", "2"]), "auto": "auto"}
    configs = _configs(Convolutions(), {**arms}, 20)
    assert configs["auto"] == advise(Convolutions(), SOME, steps=20, timed=False).best.lora_config(clip_rank=True)
    assert list(_configs(nn.Sequential(nn.Linear(8, 8)), ["kaiming", "pissa"], 20)) == ["kaiming", "pissa"]
    with pytest.raises(BadOption, match="at least two names"):
        _configs(Convolutions(), ["kaiming", "kaiming"], 20)


def test_auto_gives_what_is_to_be_preserved_to_the_start_that_protects_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    kept = [torch.randn(64, 64) * (torch.arange(64) < 48) for _ in range(4)]  # silent in its last sixteen inputs
    batches = [torch.randn(64, 64) for _ in range(10)]
    options: dict[str, Any] = {"loss": lambda model, x: (model(x) - x.sin()).square().mean(), "steps": 50, "r": 4}
    found = hs.auto(model, batches, preserve=kept, trials=0, **options)
    assert found.config.init_lora_weights == "lora_null"
    assert found.adapter.layers()["0"].lora_A.weight[:, :48].abs().max() < 1e-5
    hs.remove(model)
    with pytest.raises(BadOption, match="preserve is a bool: pass an iterable of batches"):
        hs.auto(model, batches, preserve=True, **options)


# --- the table


def test_every_rule_says_why_and_where_from() -> None:
    for rule in (*RULES, *EXCLUSIONS):
        assert len(rule.because) > 5, rule
        assert len(rule.source) > 3, rule
        assert set(rule.when) <= set(CONDITIONS), rule
    for row in EXCLUSIONS:
        assert isinstance(row.starts, tuple) or row.starts in PROPERTIES, row
    assert {name for rule in (*RULES, *EXCLUSIONS) for name in rule.when} == set(CONDITIONS), "a condition of no rule"
    assert {row.starts for row in EXCLUSIONS if isinstance(row.starts, str)} == set(PROPERTIES)


def test_what_a_rule_chooses_exists() -> None:
    pydantic = pytest.importorskip("pydantic")
    assert pydantic
    from headstart.tune.recipe import RunConfig

    known = set(hs.strategies())
    for rule in RULES:
        if rule.question == "init":
            assert rule.choose in known
        assert {name for name, _ in rule.fields} <= set(RunConfig.model_fields)
    for row in EXCLUSIONS:
        assert isinstance(row.starts, str) or set(row.starts) <= known
    assert set(RATIOS) <= known


def test_every_rule_can_be_reached(cases: list[tuple[Facts, frozenset[str]]]) -> None:
    reached: set[int] = set()
    for _, held in cases:
        out = {init for init in costs.STARTS if excluded(init, set(held))}
        for question in {rule.question for rule in RULES}:
            rules = list(answering(question, set(held)))
            assert rules, f"nobody answers {question} when {sorted(held)}"
            seen: set[str] = set()
            for rule in rules if question == "init" else rules[:1]:
                if rule.choose not in out | seen:
                    reached.add(id(rule))
                seen.add(rule.choose)
        reached |= {id(row) for row in EXCLUSIONS if held.issuperset(row.when)}
    never = [row for row in (*RULES, *EXCLUSIONS) if id(row) not in reached]
    assert not never, f"no facts lead to {never}"


def test_every_condition_can_hold_and_fail(cases: list[tuple[Facts, frozenset[str]]]) -> None:
    for name in CONDITIONS:
        assert len({name in held for _, held in cases}) == 2, name


def test_no_two_rules_contradict_each_other(cases: list[tuple[Facts, frozenset[str]]]) -> None:
    asked = [(rule.question, rule.when) for rule in RULES if rule.question != "init"]
    assert len(set(asked)) == len(asked), "two answers to one question"
    starts = [(rule.when, rule.choose) for rule in RULES if rule.question == "init"]
    assert len(set(starts)) == len(starts), "one start twice"
    for rule, row in itertools.product(RULES, EXCLUSIONS):
        if rule.question == "init" and set(row.when) <= set(rule.when) and _covers(row, rule.choose):
            pytest.fail(f"{rule} chooses what {row} rules out")
    for facts, held in cases[:: max(1, len(cases) // 60)]:
        advice = advised(facts)
        names = [each.init for each in advice.ranked]
        assert len(set(names)) == len(names)
        assert not set(names) & set(advice.ruled_out)
        assert set(names) | set(advice.ruled_out) == set(costs.STARTS)
        assert not [name for name in names if excluded(name, set(held))]


def _covers(row: Exclusion, init: str) -> bool:
    start = costs.start_of(init)
    return PROPERTIES[row.starts](start) if isinstance(row.starts, str) else init in row.starts


def test_plain_lora_is_always_an_answer(cases: list[tuple[Facts, frozenset[str]]]) -> None:
    always = [rule for rule in RULES if rule.question == "init" and not rule.when]
    assert [(rule.choose, rule.confidence) for rule in always] == [("kaiming", "high")]
    assert always[0].because.startswith("do not bother")
    for _, held in cases:
        assert excluded("kaiming", set(held)) is None
        assert any(rule.choose == "kaiming" for rule in answering("init", set(held)))


# --- what it says


def ranked(**facts: Any) -> list[str]:
    return [each.init for each in advise(LLAMA, timed=False, **facts).ranked]


def test_what_is_ranked_first() -> None:
    assert ranked(data=SOME, steps=100)[0] == "lora_one"
    assert ranked(data=SOME, steps=50_000)[0] == "kaiming"
    assert ranked(data=SOME, steps=100, sweep=8)[0] == "kaiming"
    assert ranked(steps=100)[0] == "pissa"
    assert advise(LARGE, steps=100, timed=False).best.init == "olora"
    assert ranked()[0] == "kaiming"
    assert ranked(data=SOME, steps=100, preserve=True)[:3] == ["lora_null", "kaiming", "sc_lora"]
    assert ranked(data=SOME, steps=5000, quantised=True)[0] == "qpissa"
    assert "qpissa" not in ranked(data=SOME, steps=5000, quantised=True, serve="vllm")
    assert ranked(data=SOME, trainable=1000)[:2] == ["kfac", "lora_sb"]
    assert ranked(data=SOME, trainable=1000, preserve=True)[0] == "lora_null"
    assert ranked(data=SOME, steps=100, trainable=1000, r=4)[0] == "kfac"
    assert ranked(data=SOME, steps=100, trainable=10**9, r=4)[0] == "lora_one"
    assert "lora_one" not in ranked(data=SOME, steps=100, r=128)
    assert "pissa" not in ranked(steps=100, r=512, serve="vllm")


def test_a_pass_that_does_not_fit_is_ruled_out() -> None:
    limit = int(1.02 * advise(LLAMA, SOME, steps=100, timed=False, max_length=64).best.estimate.memory.weights)
    advice = advise(LLAMA, SOME, steps=100, memory=limit, timed=False, max_length=64)
    assert advice.ruled_out["lora_one"][0].startswith("the pass for their gradients does not fit")
    assert not [each.init for each in advice.ranked if costs.start_of(each.init).looks_at_gradients]


def test_what_is_advised_fits() -> None:
    free = advise(LLAMA, SOME, steps=100, timed=False).best
    need = free.estimate.memory.peak
    assert (free.fits, free.fields["batch_size"]) == (True, 8)
    rows = []
    for share in (0.9, 0.5, 0.3):
        best = advise(LLAMA, SOME, steps=100, memory=int(share * need), timed=False).best
        assert best.estimate.memory.peak <= share * need
        assert best.fields["batch_size"] * best.fields.get("gradient_accumulation", 1) == 8
        rows.append(best.fields["batch_size"])
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 8
    tight = advise(LLAMA, SOME, steps=100, memory="100MB", timed=False)
    assert not tight.best.fits
    assert any("nothing fits 100 MB" in note and "--quantised" in note for note in tight.notes)
    assert "DOES NOT FIT" in str(tight)


def test_what_goes_beyond_a_limit_is_told() -> None:
    advice = advise(LLAMA, trainable=10, timed=False)
    assert f"{advice.best.estimate.trainable:,} numbers train, over the 10 that you named" in advice.notes[2]
    assert any("takes ranks up to 512, and this is 1024" in n for n in advise(LLAMA, r=1024, serve="vllm").notes)


def test_quantised_weights_are_those_of_a_checkpoint_that_is_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = advise(tmp_path, SOME, steps=5000, quantised=True, timed=False)
    assert asked.best.init == "qpissa"
    assert asked.best.fields["init_options"] == {"original": str(tmp_path)}
    assert {each.fields["model"] for each in asked.ranked} == {"QUANTISED"}
    assert any("QUANTISED stands for a checkpoint" in note for note in asked.notes)
    stored = advise({**LLAMA, "quantization_config": {"load_in_4bit": True}}, SOME, steps=5000, timed=False)
    assert "original" in stored.ruled_out["qpissa"][0]  # codes alone do not tell what was lost
    assert stored.best.fields["model"] == "MODEL"


def test_a_rank_that_nobody_chose_trains_at_most_a_fiftieth() -> None:
    for config in (LLAMA, LARGE, MIXTURE):
        for each in advise(config, SOME, steps=100, timed=False).ranked:
            assert each.estimate.trainable <= SHARE * each.estimate.outline.parameters
    assert advise(LLAMA, SOME, r=64, timed=False).best.fields["r"] == 64
    assert advise(LLAMA, FEW, timed=False).best.fields["r"] <= 16


@pytest.mark.parametrize("serve", ENGINES)
def test_every_engine_can_serve_what_is_advised(serve: str) -> None:
    engine = ENGINES[serve]
    for each in advise(LARGE, steps=100, serve=serve, timed=False).ranked:
        r, alpha = each.fields["r"], each.fields["lora_alpha"]
        anchored = costs.start_of(each.init).anchored
        assert engine.rank is None or r * (2 if anchored else 1) <= engine.rank
        assert each.fields["use_rslora"] == engine.reads_rslora
        s = alpha / math.sqrt(r) if each.fields["use_rslora"] else alpha / r
        assert s == pytest.approx(16 / math.sqrt(r), rel=0.05 if engine.whole_alpha else 1e-5)
        assert not engine.whole_alpha or float(alpha).is_integer()


def test_vllm_is_told_the_rank_that_the_file_will_have() -> None:
    advice = advise(LARGE, steps=100, serve="vllm", timed=False)
    assert advice.best.init == "olora"  # anchored: twice its rank in the file
    wanted = next(k for k in (8, 16, 32, 64, 128, 256) if k >= 2 * advice.best.fields["r"])
    assert any(f"--max-lora-rank {wanted}" in note for note in advice.notes)


def test_the_command_and_the_file_say_the_same(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from headstart.tune.command import given
    from headstart.tune.recipe import read, resolve

    known: list[Advice] = [
        advise(LLAMA, SOME, steps=100, memory="1GB", timed=False),
        advise(LLAMA, SOME, preserve=True, timed=False, target_modules=["q_proj", "v_proj"]),
        advise(LLAMA, steps=100, serve="sglang", timed=False),
        advise(LLAMA, steps=100, target_modules=["q_proj"], timed=False),
    ]
    for each in (each for advice in known for each in advice.ranked):
        words = shlex.split(each.command)
        assert words[:2] == ["headstart", "tune"]
        flags: dict[str, Any] = {}
        rest = words[2:]
        while rest:
            name = rest.pop(0).removeprefix("--")
            if rest and not rest[0].startswith("--"):
                flags[name.replace("-", "_")] = rest.pop(0)
            else:
                flags[name.removeprefix("no-").replace("-", "_")] = not name.startswith("no-")
        path = tmp_path / "c.yaml"
        path.write_text(each.yaml)
        run = resolve({}, given(flags))
        assert run.model_dump(exclude={"target_modules"}) == resolve(read(path)).model_dump(exclude={"target_modules"})
        asked = [outline_of(LLAMA).chosen(kind) for kind in (run.target_modules, resolve(read(path)).target_modules)]
        assert asked[0] == asked[1]
        config = each.lora_config()
        assert (config.strategy.name, config.r, config.use_rslora) == (
            each.init, each.fields["r"], each.fields["use_rslora"],
        )  # fmt: skip


def test_it_says_what_is_known_and_how_well() -> None:
    advice = hs.advise(LLAMA, SOME, steps=100, memory="16GB", serve="vllm", tflops=100)
    text = str(advice)
    assert TUNED in " ".join(text.split())
    for part in ("1. lora_one", "confidence", "because", "source", "memory", "time", "ruled out", "headstart tune"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 300  # the command alone is one long line
    told = json.loads(advice.to_json())
    assert told["ranked"][0]["init"] == advice.best.init == "lora_one"
    assert told["ranked"][0]["rate"]["value"] == advice.best.fields["learning_rate"]
    assert told["ranked"][0]["estimate"]["seconds"]["training"] > 0
    assert set(told["ruled_out"]) == set(advice.ruled_out)


def test_an_encoder_is_given_a_config_and_no_command() -> None:
    config = {
        "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500,
        "num_attention_heads": 4, "max_position_embeddings": 128, "architectures": ["BertForSequenceClassification"],
    }  # fmt: skip
    best = advise(config, SOME, steps=100, r=16, timed=False).best
    assert best.command.startswith("hs.adapt(model, hs.LoraConfig(init_lora_weights='lora_one'")
    assert best.fields["exclude_modules"] == ["classifier"]  # two rows have no room for sixteen directions
    assert best.fields["max_length"] == 128
    kept = advise(config, SOME, steps=100, r=16, preserve=True, timed=False)
    ends = {each.init: each.command.rpartition("), ")[2] for each in kept.ranked}
    assert (ends["lora_null"], ends["sc_lora"]) == ("data=preserved)", "data=batches, preserve=preserved)")


def test_rates_follow_the_published_ratios() -> None:
    plain = rate_of("kaiming", 16, 1.0, 4096).value
    for init, divisor in (("pissa", 10), ("olora", 18), ("milora", 3.2), ("init_ab", 1.8)):
        assert rate_of(init, 16, 1.0, 4096).value == pytest.approx(plain / divisor, rel=0.05)
    unknown = rate_of("tara", 16, 1.0, 4096)
    assert (unknown.value, unknown.confidence) == (plain, "low")
    assert rate_of("kaiming", 64, 1.0, 4096).value < plain


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"init": "pissa"}, UnknownField, "that is what it finds"),
        ({"ranks": 3}, UnknownField, "no field 'ranks'"),
        ({"memory": "lots"}, BadOption, "write a size such as 16GB"),
        ({"memory": -3}, BadOption, "memory is -3"),
        ({"memory": True}, BadOption, "memory is True"),
        ({"target_modules": "q_proj"}, NoTarget, r"text is an expression for whole names, so pass \['q_proj'\]"),
        ({"target_modules": "["}, BadOption, "is no regular expression"),
        ({"serve": "vlm"}, BadOption, "did you mean 'vllm'"),
        ({"steps": 0}, BadOption, "steps is 0"),
        ({"sweep": "many"}, BadOption, "sweep is 'many'"),
        ({"r": -1}, BadRank, "r is -1"),
        ({"data": "gone.jsonl"}, DataError, "no data at 'gone.jsonl'"),
        ({"preserve": "gone.jsonl"}, DataError, "no data at 'gone.jsonl'"),
    ],
)
def test_facts_that_cannot_be_meant(facts: dict[str, Any], error: type[HeadstartError], message: str) -> None:
    with pytest.raises(error, match=message):
        advise(LLAMA, timed=False, **facts)
    with pytest.raises(FileError, match="no model at"):
        advise("./gone", timed=False)


def test_names_may_be_a_set() -> None:
    fields: dict[str, Any] = {
        "target_modules": {"v_proj", "q_proj"},
        "exclude_modules": {"model.layers.0.self_attn.v_proj"},
    }
    as_set = advise(LLAMA, timed=False, **fields)
    assert as_set.best.yaml == advise(LLAMA, timed=False, **{n: sorted(v) for n, v in fields.items()}).best.yaml


# --- the look at the data


def test_rows_and_tokens_are_found_from_a_part_of_the_file(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "many.jsonl"
    line = json.dumps({"prompt": "what is " + "x" * 80, "completion": [{"role": "assistant", "content": "y" * 100}]})
    path.write_text((line + "\n") * 60_000)
    found = look(str(path))
    assert not found.exact
    assert found.rows == pytest.approx(60_000, rel=0.01)
    assert found.tokens == pytest.approx((8 + 80 + 9 + 100) / 4, rel=0.05)
    tokenizer.save_pretrained(tmp_path)
    counted = look(str(path), tmp_path / "tokenizer.json")
    assert counted.counted
    assert counted.tokens == pytest.approx(8 + 80 + 9 + 100 + 2, abs=3)  # a token a byte


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"text": "one two"}\n\n{"text": "three"}\n', 2),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', 2),
        ("a.json", '{"data": [{"text": "one"}]}', 1),
        ("a.csv", 'prompt,completion\n"a, b\nc",d\ne,f\n', 2),
        ("a.tsv", "text\none\ntwo\nthree\n", 3),
        ("a.txt", "one\ntwo\n", 2),
        ("a.txt", "one\ntwo\n\nthree\n", 2),
    ],
)
def test_every_kind_of_file_is_counted(name: str, text: str, rows: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = look(str(path))
    assert (found.rows, found.exact) == (rows, True)


@pytest.mark.parametrize("shape", ["array", "object", "noted", "lines"])
def test_a_large_json_file_is_counted_by_its_part(shape: str, tmp_path: Path) -> None:
    rows = [json.dumps({"text": "x" * 1000})] * 9000
    shapes = {"array": ("[", "]"), "object": ('{"version": "1", "data": [', "]}"), "lines": ("", "")}
    before, after = {**shapes, "noted": ('\n{"see": "[1]", "by": {"a": [2]}, "data": [', "]}")}[shape]
    (tmp_path / "a.json").write_text(before + ("\n" if shape == "lines" else ", ").join(rows) + after)
    found = look(str(tmp_path / "a.json"))
    assert not found.exact
    assert found.rows == pytest.approx(9000, rel=0.01)
    assert found.tokens == 250


def test_what_other_programs_write_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one two"}\n')
    (tmp_path / "a.csv").write_text('text\n"' + "z" * 200_000 + '"\n')
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 5_000_000}) + "\n" + '{"text": "y"}\n')
    assert look(str(tmp_path / "a.jsonl")).rows == 1
    assert look(str(tmp_path / "a.csv")).tokens == 50_000
    assert look(str(tmp_path / "b.jsonl")).tokens == 1_250_000


def test_parquet_and_the_hub(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one two three four"] * 500}), tmp_path / "a.parquet")
    assert look(str(tmp_path / "a.parquet")).rows == 500
    assert look("owner/dataset").rows is None
    assert "not looked at" in str(look("owner/dataset"))


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\x0b", "\f"])
def test_a_row_may_hold_what_else_ends_lines(inside: str, tmp_path: Path) -> None:
    rows = [{"text": f"one{inside}two"}, {"text": "three"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "a.csv").write_text(f'text\none{inside}two\n"three\nfour"\n', encoding="utf-8")
    for name in ("a.jsonl", "a.csv"):
        assert look(str(tmp_path / name)).rows == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{}\nnonsense\n", "line 2 is no JSON"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "{", "cannot read"),
        ("a.json", "null", "no list of rows"),
        pytest.param("a.json", "{}" + "\n" * 100_000 + "x", "cannot read", id="an object, then many empty lines"),
        pytest.param("a.json", '[{"text": "' + "x" * 2_000_000 + '"}, {"te', "cannot read", id="large and broken"),
        ("a.jsonl", "[" * 3000 + "]" * 3000, "cannot read"),
        ("a.jsonl", '{"text": ""}\n{"text": ""}\n', "holds no text"),
        ("a.jsonl", '{"a": 1}\n', "holds no text"),
        ("a.doc", "x", "cannot tell what"),
        ("a.parquet", "x", "cannot read"),
    ],
)
def test_data_that_cannot_be_read(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        look(str(tmp_path / name))


# --- init="auto"


def test_a_run_follows_the_advice_and_writes_it_down(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("trl", reason="the extra headstart[train]")
    import datasets

    from headstart.tune.auto import followed
    from headstart.tune.folder import Folder
    from headstart.tune.recipe import read, resolve
    from headstart.tune.train import run

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} and {i + 1} is", "completion": f" {2 * i + 1}"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(checkpoint), "data": str(data), "init": "auto", "steps": 3, "batch_size": 4, "max_length": 64}
    config = resolve({**given, "output": str(tmp_path / "run"), "dtype": "float32", "lora_dropout": 0.1, "r": 2})
    chosen = followed(config)
    assert (chosen.init, chosen.r, chosen.lora_dropout) == ("lora_one", 2, 0.1)
    assert chosen.learning_rate == "auto"
    assert chosen.advice is not None
    assert chosen.advice.startswith("headstart advise chose lora_one (medium confidence)")
    assert followed(chosen) is chosen
    said: list[str] = []
    run(config, said.append)
    folder = Folder(tmp_path / "run")
    recorded = resolve(read(folder.recipe))
    assert (recorded.init, recorded.r) == ("lora_one", 2)
    assert isinstance(recorded.learning_rate, float)
    assert str(recorded.advice).startswith(f"{chosen.advice}; rate {recorded.learning_rate:.2e}"[:-6])
    assert recorded.advice in said
    assert "Left to headstart" in (folder.adapter / "README.md").read_text()


def test_auto_asks_nothing_that_the_config_settles(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    from headstart.tune.auto import followed
    from headstart.tune.recipe import resolve

    fields = {"model": str(checkpoint), "data": "stdlib", "init": "auto", "epochs": 20, "learning_rate": 3e-3}
    small = followed(resolve({**fields, "dtype": "float32"}))
    assert small.init == "kfac"  # eight ranks of plain LoRA are more than a fiftieth of so small a model
    chosen = followed(
        resolve({**fields, "r": 2, "target_modules": ["q_proj"], "use_rslora": False, "dtype": "float32"})
    )
    assert chosen.init == "kaiming"  # twenty passes are no short run
    assert (chosen.learning_rate, chosen.target_modules, chosen.use_rslora) == (3e-3, ["q_proj"], False)


def test_a_small_model_s_run_trains_cores(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "trl"):
        pytest.importorskip(name)
    import datasets

    from headstart.tune.recipe import resolve
    from headstart.tune.train import run

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} and {i + 1} is", "completion": f" {2 * i + 1}"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"model": str(checkpoint), "data": str(data), "init": "auto", "steps": 2, "batch_size": 4, "rate_steps": 0}
    said: list[str] = []
    run(resolve({**fields, "max_length": 64, "dtype": "float32", "output": str(tmp_path / "run")}), said.append)
    assert any("headstart advise chose kfac" in line for line in said)
    share = next(line for line in said if "trainable%" in line).rpartition(" ")[2]
    assert 0 < float(share) <= 100 * SHARE


def test_the_rule_is_a_plain_record() -> None:
    assert dataclasses.is_dataclass(Rule)
    assert [f.name for f in dataclasses.fields(Rule)][:6] == [
        "question", "when", "choose", "because", "source", "confidence",
    ]  # fmt: skip
