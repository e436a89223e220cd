"""From a config.json to an outline, for the architectures that most people fine-tune; None for any other.

What a forward pass keeps is counted by hand here, tensor by tensor, and held against a traced pass by the tests. So an
advice on a 7B model takes a fraction of a second: importing torch and transformers alone takes several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headstart.choose.shapes import Kept, Matrix, Outline

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Decoder:
    """What differs between the decoders with RMS norms and a gated MLP.

    Attributes:
        norms: of the width of a block, in each.
        qk_norm: queries and keys are normalised head by head.
        qkv_bias: the three projections have biases.
        fused: q, k and v are one matrix, gate and up another.
        capped: attention is spelt out, with soft caps.
        tied: whether the output embedding is the input's, where the config does not say.
        head_dim: where the config does not say and it is not hidden / heads.
        experts: the MLP is experts in two bare parameters; the keys that their count may stand under.
        ungrouped: every head has keys of its own where the config does not say; elsewhere the class has its number.
    """

    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    fused: bool = False
    capped: bool = False
    tied: bool = False
    head_dim: int | None = None
    experts: tuple[str, ...] = ()
    ungrouped: bool = False
    width: str = "intermediate_size"


DECODERS = {
    "llama": Decoder(ungrouped=True),
    "mistral": Decoder(),
    "qwen2": Decoder(qkv_bias=True),
    "qwen3": Decoder(qk_norm=True, head_dim=128),
    "gemma": Decoder(tied=True, head_dim=256),
    "gemma2": Decoder(norms=4, capped=True, tied=True, head_dim=256),
    "gemma3_text": Decoder(norms=4, qk_norm=True, tied=True, head_dim=256),
    "phi3": Decoder(fused=True, ungrouped=True),
    "mixtral": Decoder(experts=("num_local_experts",)),
    "qwen3_moe": Decoder(qk_norm=True, experts=("num_experts", "num_local_experts"), width="moe_intermediate_size"),
}


def outline(config: Config) -> Outline | None:
    """The outline of a transformers model; None where its architecture is not known here, or a number is missing."""
    kind = str(config.get("model_type"))
    builder = BUILDERS.get(kind)
    try:
        return builder(kind, config) if builder else None
    except (KeyError, TypeError, ZeroDivisionError):  # Left to the class's own defaults, which transformers knows.
        return None


def _decoder(kind: str, config: Config) -> Outline | None:
    family = DECODERS[kind]
    h, depth, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    vocabulary, i = config["vocab_size"], config[family.width]
    groups = (config.get if family.ungrouped else config.__getitem__)("num_key_value_heads") or heads
    d = config.get("head_dim") or family.head_dim or h // heads
    q, kv = heads * d, groups * d
    if family.experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        return None
    if config.get("attention_dropout", 0.0) or not _writes(config):
        return None

    matrices = [matrix for layer in range(depth) for matrix in _decoder_block(layer, family, config, h, i, q, kv)]
    if family.experts:
        if not _experts_are_parameters():
            return None
        count, chosen = _experts(family, config), config["num_experts_per_tok"]
        block_weights = h * (q + 2 * kv) + q * h + count * 3 * h * i + count * h
        mlp = Kept(compute=chosen * (3 * i + h), wide=count + 2 * chosen, bytes=8 * chosen * 4 + 8)
        working = chosen * (3 * i + 2 * h)
    else:
        block_weights = h * (q + 2 * kv) + q * h + 3 * h * i
        mlp, working = Kept(compute=3 * i), 3 * i + 2 * h
    biases = (q + 2 * kv if family.qkv_bias or config.get("attention_bias") else 0) + (
        h if config.get("attention_bias") and kind != "qwen3" else 0
    )
    biases += (2 * i + h) if config.get("mlp_bias") else 0
    if config.get("attention_bias") and kind == "qwen3":
        biases += h
    norm_weights = family.norms * h + (2 * d if family.qk_norm else 0)
    tied = config.get("tie_word_embeddings", family.tied)
    parameters = vocabulary * h * (1 if tied else 2) + depth * (block_weights + biases + norm_weights) + h
    attention = (
        Kept(compute=3 * q, pairs=2 * heads, raised_pairs=heads)
        if family.capped
        else Kept(compute=(4 if family.fused else 3) * q, wide=heads, mask=1)
    )
    # What the attention returns is kept once, by whoever needs it: the o projection's branch, or attention itself.
    normed = Kept(wide=family.norms * (h + 1)) + Kept(wide=q + kv + heads + groups) * (1 if family.qk_norm else 0)
    kept = (attention + Kept(compute=q) + normed + mlp) * depth
    return Outline(
        kind, "config", parameters, tuple(matrices), kept, depth, h, depth * q, vocabulary,
        longest=int(config.get("max_position_embeddings") or 0), working=max(working, 4 * q), **stored(config),
    )  # fmt: skip


def _writes(config: Config) -> bool:
    """Whether the checkpoint is a language model, not a classifier or a bare decoder of the same type."""
    named = str(next(iter(config.get("architectures") or []), ""))
    return not named or named.endswith(("CausalLM", "LMHeadModel"))


def _decoder_block(layer: int, family: Decoder, config: Config, h: int, i: int, q: int, kv: int) -> Iterator[Matrix]:
    block = f"model.layers.{layer}"
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    if family.fused:
        yield Matrix(f"{attention}.qkv_proj", q + 2 * kv, h, f"{attention}.x")
        yield Matrix(f"{attention}.o_proj", h, q, f"{attention}.out", keeps=True)
        yield Matrix(f"{mlp}.gate_up_proj", 2 * i, h, f"{mlp}.x")
        yield Matrix(f"{mlp}.down_proj", h, i, f"{mlp}.out")
        return
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        yield Matrix(f"{attention}.{name}_proj", width, h, f"{attention}.x")
    yield Matrix(f"{attention}.o_proj", h, q, f"{attention}.out", keeps=True)
    if family.experts:
        count = _experts(family, config)
        used = config["num_experts_per_tok"] / count
        yield Matrix(f"{mlp}.gate", count, h, f"{mlp}.x", linear=False)
        yield Matrix(f"{mlp}.experts.gate_up_proj", 2 * i, h, f"{mlp}.x", count, used, linear=False)
        yield Matrix(f"{mlp}.experts.down_proj", h, i, f"{mlp}.out", count, used, keeps=True, linear=False)
        return
    for name in ("gate", "up"):
        yield Matrix(f"{mlp}.{name}_proj", i, h, f"{mlp}.x")
    yield Matrix(f"{mlp}.down_proj", h, i, f"{mlp}.out")


def _experts(family: Decoder, config: Config) -> int:
    """How many there are; a KeyError where no key says."""
    return int(next((config[key] for key in family.experts if key in config), None) or config[family.experts[0]])


def _experts_are_parameters() -> bool:
    """transformers 5 holds experts in bare parameters, which "all-linear" does not mean; earlier ones in Linears."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        return True


def _gpt2(kind: str, config: Config) -> Outline | None:
    h, depth, heads = config["n_embd"], config["n_layer"], config["n_head"]
    i, vocabulary, longest = config.get("n_inner") or 4 * h, config["vocab_size"], config["n_positions"]
    if config.get("add_cross_attention") or not _writes(config):
        return None
    matrices = []
    for layer in range(depth):
        block = f"transformer.h.{layer}"
        matrices += [
            Matrix(f"{block}.attn.c_attn", 3 * h, h, f"{block}.attn.x"),
            Matrix(f"{block}.attn.c_proj", h, h, f"{block}.attn.out", keeps=not config.get("attn_pdrop", 0.1)),
            Matrix(f"{block}.mlp.c_fc", i, h, f"{block}.mlp.x"),
            Matrix(f"{block}.mlp.c_proj", h, i, f"{block}.mlp.out"),
        ]
    dropped = 2 * h if config.get("resid_pdrop", 0.1) else 0
    kept = _spelt_attention(h, heads, config.get("attn_pdrop", 0.1))
    kept += Kept(compute=2 * (h + 2) + dropped + 4 * i)
    parameters = (vocabulary + longest) * h + depth * (4 * h * h + 2 * h * i + 9 * h + i) + 2 * h
    if not config.get("tie_word_embeddings", True):
        parameters += vocabulary * h
    return Outline(
        kind, "config", parameters, tuple(matrices), kept * depth, depth, h, depth * h, vocabulary,
        longest=longest, working=3 * i + 2 * h, **stored(config),
    )  # fmt: skip


def _spelt_attention(q: int, heads: int, dropout: float) -> Kept:
    """With dropout, a CPU's attention is spelt out in float32; without, it is fused and keeps no pair of tokens."""
    if dropout:
        return Kept(wide=3 * q, wide_pairs=3 * heads)
    return Kept(compute=4 * q, wide=heads, mask=1)


@dataclass(frozen=True)
class Encoder:
    """The names of a BERT's parts, and what differs.

    Attributes:
        extra: numbers of the pooler, token types and position offset; as functions of nothing but the config.
    """

    prefix: str
    query: str
    output: str
    up: str
    down: str


ENCODERS = {
    "bert": Encoder("bert.encoder.layer", "attention.self.{}", "attention.output.dense", "intermediate.dense",
                    "output.dense"),
    "roberta": Encoder("roberta.encoder.layer", "attention.self.{}", "attention.output.dense", "intermediate.dense",
                       "output.dense"),
    "xlm-roberta": Encoder("roberta.encoder.layer", "attention.self.{}", "attention.output.dense",
                           "intermediate.dense", "output.dense"),
}  # fmt: skip


def _encoder(kind: str, config: Config) -> Outline | None:
    """A classifier or a bare encoder: a masked language model's head is none of its own matrices."""
    family = ENCODERS[kind]
    h, depth, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    i, vocabulary, longest = config["intermediate_size"], config["vocab_size"], config["max_position_embeddings"]
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("add_cross_attention"):
        return None
    task = str(next(iter(config.get("architectures") or []), ""))
    bare = not task or (task.endswith("Model") and not task.endswith("HeadModel"))
    prefix = family.prefix.partition(".")[2] if bare else family.prefix
    attention_drop = config.get("attention_probs_dropout_prob", 0.1)
    matrices = []
    for layer in range(depth):
        block = f"{prefix}.{layer}"
        for name in ("query", "key", "value"):
            matrices.append(Matrix(f"{block}.{family.query.format(name)}", h, h, f"{block}.x"))
        matrices.append(Matrix(f"{block}.{family.output}", h, h, f"{block}.out", keeps=not attention_drop))
        matrices.append(Matrix(f"{block}.{family.up}", i, h, f"{block}.mlp.x"))
        matrices.append(Matrix(f"{block}.{family.down}", h, i, f"{block}.mlp.out"))
    dropped = 2 * h if config.get("hidden_dropout_prob", 0.1) else 0
    kept = _spelt_attention(h, heads, attention_drop) + Kept(compute=2 * (h + 2) + dropped + i)
    embeddings = (vocabulary + longest + config.get("type_vocab_size", 2)) * h + 2 * h
    parameters = embeddings + depth * (4 * h * h + 2 * h * i + 9 * h + i)
    pooled = h * h + h
    # The pooler is given one state of each row, and with it keeps all of them alive.
    labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    if kind == "bert" and (bare or task.endswith("ForSequenceClassification")):
        matrices.append(Matrix("pooler.dense" if bare else "bert.pooler.dense", h, h, "pooler.x", calls=0.0))
        parameters += pooled
    elif bare:
        matrices.append(Matrix("pooler.dense", h, h, "pooler.x", calls=0.0))
        parameters += pooled
    if not bare:
        if not task.endswith("ForSequenceClassification"):
            return None
        parameters += labels * h + labels
        if kind == "bert":
            matrices.append(Matrix("classifier", labels, h, "classifier.x", calls=0.0))
        else:
            matrices.append(Matrix("classifier.dense", h, h, "classifier.x", calls=0.0))
            matrices.append(Matrix("classifier.out_proj", labels, h, "classifier.out", calls=0.0))
            parameters += pooled
    return Outline(
        kind, "config", parameters, tuple(matrices), kept * depth + Kept(compute=h), depth, h, depth * h, 0,
        longest=longest, working=2 * i + 3 * h, causal=False, **stored(config),
    )  # fmt: skip


def _t5(kind: str, config: Config) -> Outline | None:
    h, depth, heads, i = config["d_model"], config["num_layers"], config["num_heads"], config["d_ff"]
    q, vocabulary = heads * config["d_kv"], config["vocab_size"]
    behind = config.get("num_decoder_layers") or depth
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    if gated or str(next(iter(config.get("architectures") or []), "")) != "T5ForConditionalGeneration":
        return None
    matrices: list[Matrix] = []
    for stack, layers in (("encoder", depth), ("decoder", behind)):
        for layer in range(layers):
            matrices += _t5_block(f"{stack}.block.{layer}.layer", stack == "decoder", h, i, q)
    drop = bool(config.get("dropout_rate", 0.1))
    attention = Kept(compute=3 * q, pairs=2 * heads + heads * drop) if not drop else Kept()
    attention = Kept(wide=3 * q, wide_pairs=3 * heads) if drop else attention
    mlp = Kept(compute=i + i * drop)
    norm, dropped = Kept(compute=h, raised=h, wide=1), Kept(compute=h * drop)
    before = attention + mlp + (norm + dropped) * 2
    after = attention * 2 + mlp + (norm + dropped) * 3
    buckets = config.get("relative_attention_num_buckets", 32) * heads
    attention_weights, mlp_weights = 4 * h * q, 2 * h * i
    parameters = vocabulary * h + 2 * h + 2 * buckets
    parameters += depth * (attention_weights + mlp_weights + 2 * h)
    parameters += behind * (2 * attention_weights + mlp_weights + 3 * h)
    if not config.get("tie_word_embeddings", True):
        parameters += vocabulary * h
    return Outline(
        kind, "config", parameters, tuple(matrices), before * depth + after * behind, depth + behind, h,
        (depth + 2 * behind) * q, vocabulary, longest=int(config.get("n_positions") or 0),
        working=2 * i + 3 * h, causal=False, **stored(config),
    )  # fmt: skip


def _t5_block(layers: str, decoder: bool, h: int, i: int, q: int) -> Iterator[Matrix]:
    own = f"{layers}.0.SelfAttention"
    for name in "qkv":
        yield Matrix(f"{own}.{name}", q, h, f"{own}.x")
    yield Matrix(f"{own}.o", h, q, f"{own}.out")
    if decoder:
        cross = f"{layers}.1.EncDecAttention"
        yield Matrix(f"{cross}.q", q, h, f"{cross}.x")
        for name in "kv":
            yield Matrix(f"{cross}.{name}", q, h, "encoder.out")
        yield Matrix(f"{cross}.o", h, q, f"{cross}.out")
    mlp = f"{layers}.{2 if decoder else 1}.DenseReluDense"
    yield Matrix(f"{mlp}.wi", i, h, f"{mlp}.x")
    yield Matrix(f"{mlp}.wo", h, i, f"{mlp}.out")


def stored(config: Config) -> dict[str, Any]:
    """The dtype of the checkpoint, and how it is quantised."""
    packed = config.get("quantization_config") or {}
    # What is quantised was never stored in float32: what is left whole there is bfloat16 unless the config says so.
    usual = "bfloat16" if packed else "float32"
    dtype = str(config.get("dtype") or config.get("torch_dtype") or usual).removeprefix("torch.")
    return {"dtype": dtype, "quantised": _bits(packed) if packed else None}


def _bits(packed: Config) -> str:
    """Of the weights, in each quantiser's own words."""
    groups = packed.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    counts = {packed.get("bits"), *(each.get("num_bits") for each in weights)}
    words = " ".join(str(packed.get(name)) for name in ("quant_method", "quant_algo", "quant_type", "weights")).lower()
    if re.search("int4_?weight", words):  # The activations may be of 8 bits.
        return "4bit"
    eight = packed.get("load_in_8bit") or 8 in counts or re.search("fp8|float8|int8|eetq", words)
    return "8bit" if eight else "4bit"


BUILDERS: dict[str, Callable[[str, Config], Outline | None]] = {
    **dict.fromkeys(DECODERS, _decoder),
    "gpt2": _gpt2,
    **dict.fromkeys(ENCODERS, _encoder),
    "t5": _t5,
}
