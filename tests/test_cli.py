"""The command line: what it prints, what it refuses, and how fast it must not be slowed down."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the extra headstart[cli]")

from headstart import cli
from headstart.errors import HeadstartError
from headstart.tune.command import parsed
from headstart.tune.recipe import RunConfig

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headstart", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        code = stopped.value.code
        return int(code or 0), shown.out, shown.err

    return call


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets", reason="the extra headstart[train]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "sums.csv"
    path.write_text("prompt,completion\n" + "".join(f"{i} and {i} is, {2 * i}\n" for i in range(40)))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def modules_after(*arguments: str) -> set[str]:
    """What a command has imported by the time it ends."""
    code = "import sys\nfrom headstart.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["tune", "--help"],
        ["tune", "--r", "0"],
        ["tune", "--lora_alpah", "3"],
        ["--version"],
        ["merge", "a"],
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    assert not modules_after(*arguments) & {"torch", "numpy", "transformers", "datasets"}


def test_the_first_help_does_not_even_wait_for_pydantic() -> None:
    assert not modules_after("--help") & {"pydantic", "yaml", "rich"}


def test_every_field_is_a_flag_with_its_description(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("tune", "--help")
    assert code == 0
    for name, field in RunConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in out
        assert str(field.description)[:30] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "BadOption: no model: pass --model or write 'model: ...' in the config"),
        (["tune", "--model", "m", "--data", "d", "--r", "4.5"], "BadRank: r is 4.5: should be a valid integer"),
        (["tune", "--lora-alpa", "3"], "UnknownField: No such option: --lora-alpa"),
        (["tune", "--config", "gone.yaml"], "ConfigError: no config file 'gone.yaml'"),
        (["tune", "--model", "m", "--data", "d", "--init", "pisa"], "UnknownInit: no init is called 'pisa'; did you"),
        (["explain", "pisa"], "UnknownInit: no init is called 'pisa'; did you mean 'pissa'"),
        (["tun"], "UnknownField: No such command 'tun'. Did you mean 'tune'?"),
        (["merge", "a"], "ConfigError: Missing argument"),
        (["merge", "./a", "b", "--out", "c"], "FileError: no model at './a'"),
        (["merge", "a", "b", "--out", "c", "--dtype", "int8"], "BadOption: dtype is 'int8'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_debugging_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["headstart", "explain", "pisa"])
    with pytest.raises(HeadstartError):
        cli.main()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", "1e3", "1e3"),
        ("steps", "60", 60),
        ("steps", "none", None),
        ("bias", "none", "none"),
        ("report_to", "none", "none"),
        ("learning_rate", "1e-3", "1e-3"),
        ("init", "true", True),
        ("init", "pissa", "pissa"),
        ("init_options", "niter=16,tolerance=0.1", {"niter": 16, "tolerance": 0.1}),
        ("init_options", "{niter: 16}", {"niter": 16}),
        ("target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("target_modules", "*broken", "*broken"),
        ("layers_to_transform", "[0, 1]", [0, 1]),
    ],
)
def test_a_flag_says_what_a_config_file_would(name: str, text: str, value: object) -> None:
    assert parsed(text, RunConfig.model_fields[name].annotation) == value


def test_version_and_no_arguments(call: Call) -> None:
    import headstart

    assert call("--version")[:2] == (0, f"headstart {headstart.__version__}\n")
    code, out, _ = call()
    assert code == 0
    assert "Usage: headstart" in out


def test_inits_lists_every_start(call: Call) -> None:
    import headstart

    code, out, _ = call("inits", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert list(rows) == headstart.strategies()
    assert (rows["pissa"]["anchored"], rows["kaiming"]["anchored"]) == (True, False)
    assert (rows["pissa"]["needs"], rows["kaiming"]["needs"]) == (["the weight"], [])
    assert [rows[name]["trains"] for name in ("mica", "pissa", "lora_sb")] == ["A", "A and B", "R"]
    assert rows["lora_da"]["needs"] == ["inputs", "gradient", "output_squares"]
    code, out, _ = call("inits")
    words = set(out.split())
    assert all(words >= {name, *row["fact"].split()} for name, row in rows.items())


def test_a_terminal_without_the_letters_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["headstart", "explain", "pissa"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    stream.flush()
    assert not stopped.value.code
    assert b"W = U?S?V?" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_explain_shows_the_mathematics(call: Call) -> None:
    code, out, _ = call("explain", "pissa_niter_4")
    assert code == 0
    assert "W = U·S·Vᵀ" in out
    assert "arXiv 2404.02948" in out
    assert "Args:" in out


def test_tune_from_a_file_with_flags_on_top(call: Call, checkpoint: Path, sums: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(f"model: {checkpoint}\ndata: {sums}\nr: 2\nsteps: 5\ndtype: float32\n")
    arguments = ["tune", "--config", str(config), "--steps", "2", "--lora_alpha", "4", "--output", str(output)]
    code, out, err = call(*arguments, "--dry-run", "--json")
    forecast = json.loads(out)
    assert code == 0
    assert (forecast["config"]["r"], forecast["config"]["steps"], forecast["config"]["lora_alpha"]) == (2, 2, 4)
    assert not output.exists()
    code, text, _ = call(*arguments, "--dry-run")
    assert f"trainable params: {forecast['trainable']:,} || all params: {forecast['total']:,}" in text
    assert "r: 2\n" in text
    assert "predicted memory" in text
    assert "traced" in text
    code, out, err = call(*arguments, "--json")
    finished = json.loads(out)
    assert code == 0
    assert (finished["steps"], finished["trainable"]) == (2, forecast["trainable"])
    assert "trainable params: " in err  # stdout is for the program that asked
    assert "\x1b" not in err
    assert call(*arguments)[0] == 2  # finished: not written over
    again = ["tune", "--config", str(output / "run.yaml"), "--output", str(tmp_path / "again"), "--json"]
    assert json.loads(call(*again)[1])["held_out_after"] == finished["held_out_after"]


def test_merge_writes_a_model(call: Call, checkpoint: Path, sums: Path, tmp_path: Path) -> None:
    output, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert call("tune", "--model", str(checkpoint), "--data", str(sums), "--steps", "1", "--output", output)[0] == 0
    code, out, _ = call("merge", str(checkpoint), f"{output}/adapter", "--out", merged, "--dtype", "bfloat16")
    assert code == 0
    assert f"14 layers merged into {merged} (bfloat16" in out
    assert call("merge", str(checkpoint), f"{output}/adapter", "--out", merged)[0] == 2


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(checkpoint: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["tune", "--model", str(checkpoint), "--data", str(sums), "--steps", "100000", "--output", str(output)]
    arguments += ["--save-every", "100000", "--eval-every", "100000", "--threads", "1"]
    command = [sys.executable, "-m", "headstart.cli", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where pytest ignores it
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = output / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"to go on: headstart tune --config {output / 'run.yaml'}" in err
    assert "Traceback" not in err
    assert list((output / "checkpoints").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
def test_two_processes_train_one_adapter(checkpoint: Path, sums: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "headstart.cli", "tune", "--model", str(checkpoint), "--data", str(sums)]
    command += ["--steps", "3", "--batch-size", "2", "--output", str(output), "--json", "--dtype", "float32"]
    env = {**environment(), "ACCELERATE_USE_CPU": "1"}  # what `accelerate launch --cpu` sets
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    finished: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert finished["steps"] == 3
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert sum("loss" in json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()) == 3
