"""Both shells under everything that trains: Trainer, TRL, accelerate, plain loops, compiled, checkpointed, sharded.

A model of the native shell is an ordinary PreTrainedModel to Trainer, which checkpoints it whole; `hs.save` writes the
adapter. A PeftModel of ours is a PeftModel: every checkpoint is plain LoRA.
"""

from __future__ import annotations

import copy
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState
from headstart.lora.adapter import adapter_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Maker = Callable[[], Any]
IDS = torch.arange(3, 99).reshape(4, 24)


def config(**changes: Any) -> hs.LoraConfig:
    fields = {
        "r": 4,
        "lora_alpha": 4,
        "init_lora_weights": "pissa",
        "target_modules": ["q_proj", "down_proj"],
        "seed": 1,
    }
    return hs.LoraConfig(**{**fields, **changes})


def in_native(base: Any, **changes: Any) -> Any:
    return hs.adapt(base, config(**changes)).model


def in_peft(base: Any, **changes: Any) -> Any:
    from headstart.peft import get_peft_model

    return get_peft_model(base, config(**changes))


SHELLS = {"native": in_native, "peft": in_peft}
both_shells = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder) if hasattr(model, "peft_config") else hs.save(model, folder)


def adapter(model: Any) -> dict[str, Tensor]:
    """What trains, by the names that both shells share."""
    found = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in model.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in found.items() if parameter.requires_grad}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def in_plain_peft(base: Any, folder: Path) -> Any:
    """An adapter as everybody loads it; what is in the folder is plain LoRA."""
    import peft

    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["init_lora_weights"] is True
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


# ------------------------------------------------------------------ Trainer


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


def trainer(model: Any, folder: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": 4, "learning_rate": 0.1, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant", "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:4])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@both_shells
def test_trainer_learns_and_resumes_to_the_bit(shell: Maker, llama: Maker, tmp_path: Path) -> None:
    whole = trainer(shell(llama(), lora_dropout=0.1), tmp_path / "run", gradient_accumulation_steps=2)
    whole.train()
    found = losses(whole)
    assert found[-1] < found[0] - 0.02
    resumed = trainer(shell(llama(), lora_dropout=0.1), tmp_path / "again", gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(adapter(resumed.model), adapter(whole.model))
    assert losses(resumed)[2:] == found[2:]

    save(whole.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(in_plain_peft(llama(), tmp_path / "adapter")), logits(whole.model))
    last = tmp_path / "run" / "checkpoint-4"
    if shell is in_peft:
        torch.testing.assert_close(logits(in_plain_peft(llama(), last)), logits(whole.model))
        assert not (last / "model.safetensors").exists()
    else:  # Trainer knows no adapter here: its checkpoints hold the whole model, and serve to resume
        assert not (last / "adapter_model.safetensors").exists()
        assert (last / "model.safetensors").exists()


@both_shells
def test_trainer_brings_back_the_best_model(shell: Maker, llama: Maker, tmp_path: Path) -> None:
    best = trainer(
        shell(llama()), tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1,
        metric_for_best_model="loss", max_steps=3, learning_rate=0.3,
    )  # fmt: skip
    best.train()
    evaluated = {e["step"]: e["eval_loss"] for e in best.state.log_history if "eval_loss" in e}
    step = min(evaluated, key=lambda step: evaluated[step])
    assert best.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert best.evaluate()["eval_loss"] == pytest.approx(evaluated[step], rel=1e-6)


# ------------------------------------------------------------------ TRL


@both_shells
def test_sft_learns(shell: Maker, llama: Maker, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.1, per_device_train_batch_size=2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, bf16=False, max_length=32, save_steps=3,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "to be or not to be"}] * 6)
    sft = SFTTrainer(shell(llama()), arguments, train_dataset=data, processing_class=tokenizer)
    sft.train()
    assert losses(sft)[-1] < losses(sft)[0] - 0.05
    if shell is in_peft:
        torch.testing.assert_close(logits(in_plain_peft(llama(), tmp_path / "checkpoint-3")), logits(sft.model))


def test_dpo_measures_against_the_untouched_base(llama: Maker, tokenizer: Any, tmp_path: Path) -> None:
    """With PEFT's own PiSSA the reference would be what is left of the base without its leading directions."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.1, per_device_train_batch_size=2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, bf16=False, max_length=32, save_steps=1,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "to be ", "chosen": "or not", "rejected": "and so on"}] * 4)
    base = llama()
    wanted = logits(base.requires_grad_(False))
    dpo = DPOTrainer(in_peft(base), args=arguments, train_dataset=data, processing_class=tokenizer)
    dpo.train()
    assert losses(dpo)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(dpo)[1] < losses(dpo)[0] - 0.01
    model = dpo.accelerator.unwrap_model(dpo.model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    if "ref" in model.peft_config:
        model.set_adapter("ref")
        assert torch.equal(logits(model), wanted)
    torch.testing.assert_close(logits(in_plain_peft(llama(), tmp_path / "checkpoint-2")), trained)
    again = DPOTrainer(in_peft(llama()), args=arguments, train_dataset=data, processing_class=tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(again.accelerator.unwrap_model(again.model)), trained)


# ------------------------------------------------------------------ loops


def steps(model: Any, count: int = 3, accelerator: Any = None) -> dict[str, Tensor]:
    """A loop as one writes it; what trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss) if accelerator is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter(accelerator.unwrap_model(model) if accelerator is not None else model)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "mica"])
def test_a_plain_loop_and_accelerate_train_both_shells_alike(init: str, llama: Maker) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    changes = {"init_lora_weights": init, "use_dora": True, "bias": "all"}
    native, model = in_native(llama(), **changes), in_peft(llama(), **changes)
    found = {name.removesuffix(".weight"): value for name, value in steps(model).items()}
    wanted = {name.removesuffix(".weight"): value for name, value in steps(native).items()}
    assert same(found, wanted)
    prepared = steps(in_peft(llama(), **changes), accelerator=Accelerator(cpu=True))
    assert same({name.removesuffix(".weight"): value for name, value in prepared.items()}, wanted)


def gradients(model: Any, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@both_shells
def test_a_graph_that_waits_survives_disabling(shell: Maker) -> None:
    """As in DPO: the policy's forward, then the reference's without adapters, then the backward."""
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model, x = shell(base, r=2, bias="all", target_modules="all-linear"), torch.randn(4, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        base[1].bias += 1
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    loss = model(x).square().sum()
    with torch.no_grad(), model.disable_adapter() if shell is in_peft else adapter_of(model).disabled():
        model(x)
    assert all(map(torch.equal, torch.autograd.grad(loss, trained), wanted))


@pytest.mark.parametrize("reentrant", [False, True])
@both_shells
def test_gradient_checkpointing_changes_nothing(shell: Maker, reentrant: bool, llama: Maker) -> None:
    model = shell(llama(), use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"]).train()
    loss, wanted = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, found = gradients(model)
    assert torch.equal(loss, again)
    assert same(found, wanted)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("use_dora", [False, True])
@both_shells
def test_half_precision_and_autocast_train_float32_factors(shell: Maker, use_dora: bool, llama: Maker) -> None:
    exact, wanted = gradients(shell(llama(), use_dora=use_dora))
    model = shell(llama(), use_dora=use_dora)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(model)
    for loss, found in (cast, gradients(shell(llama().bfloat16(), use_dora=use_dora))):
        torch.testing.assert_close(loss.float(), exact, rtol=2e-2, atol=2e-2)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, wanted[name], rtol=0.2, atol=0.1 * float(wanted[name].abs().max()))


# ------------------------------------------------------------------ torch.compile


def graph_breaks(model: Any) -> int:
    from torch import _dynamo as dynamo

    dynamo.reset()
    return dynamo.explain(lambda: model(input_ids=IDS, use_cache=False).logits)().graph_break_count


@pytest.fixture(scope="module")
def shallow(llama: Maker) -> Maker:
    """A model of one layer, which is traced in half the time."""
    base = llama().train()
    base.model.layers = base.model.layers[:1]
    return lambda: copy.deepcopy(base)


@pytest.fixture(scope="module")
def unavoidable(shallow: Maker) -> int:
    """The breaks that the base model has by itself."""
    return graph_breaks(shallow())


@pytest.mark.parametrize("use_dora", [False, True])
@both_shells
def test_our_layers_break_no_graph(shell: Maker, use_dora: bool, shallow: Maker, unavoidable: int) -> None:
    model = shell(shallow(), use_dora=use_dora, target_modules=["q_proj", "down_proj", "embed_tokens"])
    assert graph_breaks(model) <= unavoidable


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"init_lora_weights": True}])
def test_a_linear_layer_compiles_into_one_graph(changes: dict[str, Any]) -> None:
    torch.compiler.reset()
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = hs.adapt(base, config(r=2, target_modules="all-linear", **changes)).model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(0)
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    torch.manual_seed(0)
    found = torch.autograd.grad(compiled(x).square().sum(), trained)
    if "lora_dropout" not in changes:  # eager draws the dropped positions another way
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ several processes


def small() -> nn.Module:
    """Blocks as they are sharded: one unit each, and layers of every sort in them."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model


def inputs() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def adapted_small() -> nn.Module:
    """Everything that can train, and moved from its start, so that a forgotten anchor or bias would show."""
    fields: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "use_dora": True, "bias": "all"}
    model = hs.adapt(small(), hs.LoraConfig(init_lora_weights="pissa", **fields)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 if parameter.requires_grad else 0
    return model


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        compare(in_ddp, rank, f"{folder}/ddp")
        compare(in_fsdp2, rank, f"{folder}/fsdp2")
        sharded = adapted_small()
        in_fsdp2(sharded)
        with pytest.raises(AdapterState, match="sharded"):
            hs.merge(sharded)
        with pytest.raises(AdapterState, match="sharded"):
            hs.adapt(in_fsdp2(small()))
    finally:
        dist.destroy_process_group()


def compare(wrap: Callable[[nn.Module], nn.Module], rank: int, folder: str) -> None:
    """A step on this process's half of the batch, against one process on all of it."""
    import torch.distributed as dist

    alone, model = adapted_small(), adapted_small()
    wanted = alone(inputs()).square().mean()
    wanted.backward()
    wrapped = wrap(model)
    loss = wrapped(inputs().chunk(2)[rank]).square().mean()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, wanted.detach())
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients), name
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), gradients[name], msg=name)
    if rank == 0 or wrap is in_fsdp2:  # sharded parameters are gathered by all, and written by the first
        hs.save(model, folder)
    dist.barrier()
    loaded = small()
    hs.load(loaded, folder)
    torch.testing.assert_close(loaded(inputs()), alone(inputs()))


def in_ddp(model: nn.Module) -> nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


def in_fsdp2(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
