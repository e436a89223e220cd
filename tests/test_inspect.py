"""The anatomy of an adapter against dense float64, and its page against an HTML parser."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterFormatError, WrongBase
from headstart.files.doctor.anatomy import effective_rank, inspect, needed_rank, spectrum
from headstart.files.doctor.page import grid, outline, to_html
from headstart.testing.cases import Case
from headstart.testing.kinds import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def _ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 200 + 3


def _saved(model: nn.Module, folder: Path, **fields: Any) -> Path:
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def _dense(folder: Path, scale: float) -> dict[str, np.ndarray[Any, Any]]:
    """ΔW of every linear layer, by numpy."""
    tensors = {name: value.double().numpy() for name, value in load_file(folder / TENSORS).items()}
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * tensors[key.replace("_A.", "_B.")]
        @ A
        for key, A in tensors.items()
        if key.endswith("lora_A.weight")
    }


def test_norms_and_spectra_are_those_of_the_dense_product(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = _saved(llama(), tmp_path, target_modules=["q_proj", "down_proj"], use_rslora=True)
    found, base = inspect(folder, llama()), dict(llama().named_parameters())
    dense = _dense(folder, 6 / math.sqrt(4))
    assert {layer.name for layer in found.layers} == set(dense)
    for layer in found.layers:
        change = dense[layer.name]
        S = np.linalg.svd(change, compute_uv=False)[:4]
        np.testing.assert_allclose(layer.spectrum, S, rtol=1e-10)
        assert layer.norm == pytest.approx(np.linalg.norm(change), rel=1e-10)
        W = np.linalg.norm(base[f"{layer.name}.weight"].detach().double().numpy())
        assert layer.relative == pytest.approx(layer.norm / W, rel=1e-6)
        assert layer.shape == change.shape
        assert (layer.rank, layer.scaling) == (4, 3.0)
        p = S / S.sum()
        assert layer.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert found.norm == pytest.approx(math.sqrt(sum(np.linalg.norm(change) ** 2 for change in dense.values())))
    assert found.parameters == sum(value.numel() for value in load_file(folder / TENSORS).values())


def test_ranks_of_spectra_that_are_known() -> None:
    assert effective_rank(torch.ones(5).double()) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3).double()) == 0
    assert needed_rank(torch.tensor([10.0, 2, 0.1]).double()) == 2
    assert needed_rank(torch.tensor([100.0, 1]).double()) == 1
    assert needed_rank(torch.ones(4).double()) == 4
    assert needed_rank(torch.zeros(2)) == 0


@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 3), (3, 4, 9), (1, 6, 2)])  # more rank than there are columns, too
def test_the_spectrum_of_any_shape(shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    B, A = torch.randn(m, r).double(), torch.randn(r, n).double()
    wanted = torch.linalg.svdvals(B @ A)
    found = spectrum(B, A)[: len(wanted)]
    torch.testing.assert_close(found, wanted[: len(found)], rtol=1e-9, atol=1e-9)


def test_layers_stand_in_the_order_of_the_model(tmp_path: Path) -> None:
    blocks = nn.Module()
    blocks.layers = nn.ModuleList(nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)}) for _ in range(12))
    found = inspect(_saved(blocks, tmp_path, target_modules=["a", "b"]))
    assert [layer.name for layer in found.layers[:4]] == ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    assert found.layers[-1].name == "layers.11.b"
    numbers, rows = grid(found.layers)
    assert numbers == [str(i) for i in range(12)]
    assert [(row.kind, len(row.layers)) for row in rows] == [("a", 12), ("b", 12)]


def test_convolutions_embeddings_and_experts(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grouped = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 8, 3, groups=2)
            self.table = nn.Embedding(11, 5)

    folder = _saved(Kinds(), tmp_path / "kinds", target_modules=["conv", "grouped", "table"])
    model = peft.PeftModel.from_pretrained(Kinds(), folder)
    for layer in inspect(folder).layers:
        there: Any = model.get_submodule(f"base_model.model.{layer.name}")
        if layer.name == "grouped":  # PEFT gives no dense change of these
            A, B = (x["default"].weight.detach().flatten(1) for x in (there.lora_A, there.lora_B))
            wanted = 1.5 * torch.einsum("gor,gri->goi", B.view(2, 4, 2), A.view(2, 2, -1))
        else:
            wanted = there.get_delta_weight("default")
        assert layer.norm == pytest.approx(float(wanted.detach().double().norm()), rel=1e-5), layer.name

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 5, 6))

    mixture = nn.ModuleDict({"experts": Experts()})
    folder = _saved(mixture, tmp_path / "experts", target_modules=[], target_parameters=["experts.gate_up_proj"])
    tensors = load_file(folder / TENSORS)
    A = next(v for n, v in tensors.items() if "lora_A" in n).double().view(3, 4, 6)
    B = next(v for n, v in tensors.items() if "lora_B" in n).double().view(5, 4, 3)
    whole = torch.stack([1.5 * B[:, :, e] @ A[e] for e in range(3)])
    (layer,) = inspect(folder).layers
    assert (layer.experts, layer.rank) == (3, 4)
    assert layer.norm == pytest.approx(float(whole.norm()), rel=1e-10)
    furthest = whole[whole.norm(dim=(1, 2)).argmax()]
    assert layer.spectrum == pytest.approx(torch.linalg.svdvals(furthest)[:4].tolist(), rel=1e-9)
    (layer,) = inspect(folder, nn.ModuleDict({"experts": Experts()})).layers
    assert layer.norm == pytest.approx(float(whole.norm()), rel=1e-10)
    assert layer.relative is not None


@pytest.mark.parametrize("kind", ["attention", "encoder_attention"])
def test_an_attentions_output_is_measured_as_it_is_added(kind: str, tmp_path: Path) -> None:
    case = Case("pissa", KINDS[kind])
    merged, before = copy.deepcopy(case.trained), case.model().state_dict()
    hs.save(merged, tmp_path)
    hs.merge(merged)
    found = {layer.name: layer.norm for layer in hs.inspect(tmp_path).layers if layer.name.endswith("out_proj")}
    assert found
    for name, norm in found.items():
        change = merged.state_dict()[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert norm == pytest.approx(float(change.norm()), rel=1e-4)


def test_one_part_of_a_projection_is_of_its_base_and_no_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 18))
    model = copy.deepcopy(base)
    config = hs.LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa", parts={"0": [False, True, False]})
    hs.adapt(model, config)
    hs.save(model, tmp_path)
    assert hs.inspect(tmp_path, base).layers[0].shape == (6, 12)
    assert not hs.doctor(tmp_path, base).faults
    nn.init.normal_(base[0].weight)
    with pytest.raises(WrongBase):
        hs.inspect(tmp_path, base)


def test_what_made_it_is_read_where_it_was_written_down(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = llama()
    batches = [{"input_ids": _ids(), "labels": _ids()}] * 2
    hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights="lora_one", init_options={"gamma": 64.0}), data=batches)
    hs.save(model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.yaml").write_text("learning_rate: 0.0003\nsteps: 7\ndata: &a [x]\nmore: [*a, *a]\n")
    made = inspect(tmp_path / "run" / "adapter").made
    assert (made["start"], made["options"], made["seed"]) == ("lora_one", {"gamma": 64.0}, 0)
    assert (made["learning_rate"], made["steps"]) == (0.0003, 7)
    assert "data" not in made  # words and numbers only
    (tmp_path / "run" / "run.yaml").write_text("learning_rate: !!python/object/apply:os.mkdir [trap]\n")
    assert "learning_rate" not in inspect(tmp_path / "run" / "adapter").made
    told = inspect(_saved(llama(), tmp_path / "peft", init_lora_weights="olora", target_modules=["q_proj"])).made
    assert (told["start"], told["told by"]) == ("olora", "init_lora_weights=olora")


def test_what_cannot_be_measured_is_named(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = _saved(llama(), tmp_path, target_modules=["q_proj", "v_proj"])
    tensors = load_file(folder / TENSORS)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[first][0, 0] = math.nan
    save_file(tensors, folder / TENSORS)
    found = inspect(folder)
    assert "NaN" in found.unread["model.layers.0.self_attn.q_proj"]
    assert len(found.layers) == 3
    json.loads(found.to_json(), parse_constant=pytest.fail)
    wrong = inspect(folder, nn.Sequential(nn.Linear(2, 2)))
    assert not wrong.layers
    assert len(wrong.unread) == 4
    assert "Not measured" in to_html(wrong)
    (folder / TENSORS).write_bytes(b"")
    with pytest.raises(AdapterFormatError, match="cut off"):
        inspect(folder)


# ------------------------------------------------------------------ the page

_VOID = {"meta", "link", "br", "path"}


class _Checked(HTMLParser):
    """Every tag closed by its own, nothing fetched, no script."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onerror", "srcset"}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def _checked(page: str) -> _Checked:
    parser = _Checked()
    parser.feed(page)
    assert not parser.open
    assert not parser.seen & {"script", "iframe", "img", "link", "object"}
    assert not re.search(r"https?:|@import|url\(", page)
    return parser


def test_the_page_is_whole_and_fetches_nothing(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = _saved(llama(), tmp_path, target_modules=["q_proj", "v_proj"])
    for base in (None, llama()):
        parser = _checked(to_html(inspect(folder, base)))
        for layer in inspect(folder).layers:
            assert layer.name in parser.text
        assert {"table", "svg", "path", "style"} <= parser.seen
        assert ("‖ΔW‖/‖W‖" in parser.text) == (base is not None)


def test_a_stranger_cannot_write_into_the_page(tmp_path: Path) -> None:
    name = 'base_model.model.<script>alert(1)</script>"><img src=x>.lora_'
    save_file({f"{name}A.weight": torch.ones(2, 3), f"{name}B.weight": torch.ones(4, 2)}, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "<b>1"}))
    parser = _checked(to_html(inspect(tmp_path)))
    assert "<script>alert(1)</script>" in parser.text
    assert "<b>1" in parser.text


def test_outlines_of_any_length() -> None:
    assert outline([2.0, 1.0]) == "M0 24V0.0H48.0V12.0H96.0V24Z"
    assert outline([0.0]) == "M0 24V24.0H96.0V24Z"
    assert outline([]) == "M0 24V24Z"
    assert outline([float(500 - i) for i in range(500)]).count("H") == 96


def test_an_adapter_that_does_nothing_has_a_page(llama: Callable[[], nn.Module], tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.norm == 0
    assert {(layer.effective_rank, layer.needed_rank) for layer in found.layers} == {(0.0, 0)}
    _checked(to_html(found))


def test_the_command_prints_and_writes(
    llama: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart import cli

    folder = _saved(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["headstart", "inspect", str(folder), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    page = tmp_path / "page.html"
    out = run("--html", str(page))
    assert "self_attn.q_proj" in out
    assert "█" in out
    assert "of 4" in out
    assert page.read_text(encoding="utf-8") == to_html(inspect(folder))
    assert len(json.loads(run("--json"))["layers"]) == 4
