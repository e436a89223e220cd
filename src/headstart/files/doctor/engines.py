"""Who reads an adapter how: a table of rules, read from the engines' own sources.

An engine differs from PEFT in the scale that it applies, which is a formula, and in what it refuses or passes over,
which are rules: *when* finds what in a survey concerns the rule, the rest is what to say about it. `doctor.py` walks
the table. The versions are those whose sources were read, in November 2026; engines change monthly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from headstart.files.doctor.survey import Layer, Survey
from headstart.files.doctor.traits import (
    When,
    added_tokens,
    embeddings,
    heads,
    lacks,
    magnitude_untold,
    magnitudes,
    no_base_name,
    not_a_start_of,
    other_rank_than_r,
    other_rank_than_stated,
    padded,
    query_without_value,
    rank_above,
    rank_to_pad,
    says,
    some_layers_only,
    starts,
    targets_no_list,
    tensors,
    unaccounted,
    uneven_kinds,
    unsaved,
    untargeted,
    without_magnitude,
    without_prefix,
)


class Verdict(str, Enum):
    """What comes of it, the worst last."""

    LOADS = "loads"
    FOREIGN = "needs another format"
    DIFFERS = "loads, but means something else"
    REFUSES = "refuses"


class Effect(str, Enum):
    """What a reader that differs does to a layer, where that can be put in numbers."""

    DROPPED = "the layer is left out"
    NO_MAGNITUDE = "the magnitude is passed over"
    PLAIN_START = "the start is added to a base that still holds it"


@dataclass(frozen=True)
class Engine:
    """A reader of adapters.

    Attributes:
        key: what the command line calls it; title: with the version that was read.
        reads: the dialects that it reads itself; profile: the export that it reads in any case.
        scale: s as it computes it; blind: the config's fields that this s does not see.
        pictures: whether it is of the world of diffusion models, and of no matter to others.
    """

    key: str
    title: str
    reads: tuple[str, ...]
    profile: str
    scale: Callable[[Survey, Layer], float]
    blind: tuple[str, ...] = ()
    pictures: bool = False


@dataclass(frozen=True)
class Rule:
    """One thing that some engines do.

    Attributes:
        engines: their keys; when: what in a survey it concerns, nothing if it does not apply.
        verdict: LOADS for what is only to be known. because: why, {found} names what it concerns.
        repair: what to do; source: where in the engine it stands; effect: what it makes of the layers found.
    """

    engines: tuple[str, ...]
    when: When
    verdict: Verdict
    because: str
    repair: str
    source: str
    effect: Effect | None = None


# ------------------------------------------------------------------ scales


def _own(survey: Survey, layer: Layer) -> float:
    return layer.scaling


def _one_for_all(survey: Survey, layer: Layer) -> float:
    return float(survey.config["lora_alpha"]) / int(survey.config["r"])


def _rank_before(survey: Survey, layer: Layer) -> float:
    """LoRAX writes the padded rank of a kind of layer into the config, from which it scales the next kind."""
    rank, kind = int(survey.config["r"]), layer.name.rpartition(".")[2]
    ranks = {x.name.rpartition(".")[2]: x.rank for x in survey.layers.values()}
    order = sorted(ranks, key=lambda one: _KINDS.index(one) if one in _KINDS else len(_KINDS))
    if before := order[: order.index(kind)]:
        rank = padded(ranks[before[-1]])
    return float(survey.config["lora_alpha"]) / (math.sqrt(rank) if survey.config.get("use_rslora") else rank)


_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")  # as LoRAX loads them


def _alpha_by_tensor(survey: Survey, layer: Layer) -> float:
    alpha = float(survey.config["lora_alpha"])
    return alpha / layer.rank if alpha else 1.0  # An alpha of zero stands for none.


_PATTERNS = ("rank_pattern", "alpha_pattern")
ENGINES = (
    Engine("peft", "PEFT 0.21.2", ("PEFT",), "portable", _own),
    Engine("vllm", "vLLM 0.33", ("PEFT",), "portable", _own),
    Engine("sglang", "SGLang 0.5.23", ("PEFT",), "portable", _one_for_all, ("use_rslora", *_PATTERNS)),
    Engine("lorax", "LoRAX", ("PEFT",), "portable", _rank_before, _PATTERNS),
    Engine("llama.cpp", "llama.cpp's converter", ("PEFT",), "portable", _alpha_by_tensor, ("use_rslora", *_PATTERNS)),
    Engine("mlx", "mlx-lm 0.32", ("mlx",), "mlx", _own),
    Engine("diffusers", "diffusers 0.42", ("diffusers", "kohya"), "kohya", _own, pictures=True),
    Engine("kohya", "kohya, A1111, ComfyUI", ("kohya",), "kohya", _own, pictures=True),
)
KEYS = tuple(engine.key for engine in ENGINES)


# ------------------------------------------------------------------ the rules

PORTABLE = "headstart export {adapter} --profile portable --out fixed/"
OTHER = "headstart export {adapter} --profile {profile} --out {out}"
MERGE = "headstart merge {base} {adapter} --out merged/"
UNCHANGE = "{unchange}"  # filled in by the start: what follows from the base alone can be restored
RESTORE = "headstart doctor {adapter} --base {base} --restore fixed/"
INITIAL = (
    "headstart export {adapter} --initial START --profile portable --out fixed/, START being the adapter as it was "
    "saved before training; without one, merge where it was trained"
)
CHANGED = r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq"  # the starts of PEFT that replace the base's weights
_PEFT_KNOWS = rf"true|false|gaussian|eva|orthogonal|mica|{CHANGED}"
_BESIDE = r"\.base_layer\.weight$"
_READ_PLAIN = ("sglang", "lorax", "llama.cpp")
_DIFFERS, _REFUSES, _LOADS = Verdict.DIFFERS, Verdict.REFUSES, Verdict.LOADS

RULES = (
    # --- starts that live in a changed base
    Rule(("peft",), not_a_start_of(_PEFT_KNOWS), _REFUSES, "it knows no init_lora_weights={found}",
         "set init_lora_weights to true in the config", "tuners/lora/layer.py: reset_lora_parameters"),
    Rule(("peft",), starts(r"pissa_niter_\d+"), _DIFFERS,
         "it decomposes the base again on loading, by a randomised SVD without a seed: another start than the one that "
         "was trained (7 to 25 % off the output on small models)", UNCHANGE, "tuners/lora/layer.py: pissa_init"),
    Rule(("peft",), starts("pissa|olora"), _LOADS,
         "it decomposes the base again on loading and changes its weights: right on the same base in the same dtype, "
         "wrong with the adapter switched off, or beside a second adapter", UNCHANGE, "tuners/lora/layer.py"),
    Rule(("peft",), starts("lora_ga"), _DIFFERS,
         "without the gradients of its training it starts as plain LoRA and does not change the base (53 % off the "
         "output on a small model, without a warning)", UNCHANGE, "tuners/lora/layer.py: lora_ga_init",
         Effect.PLAIN_START),
    Rule(("peft",), starts("corda"), _REFUSES, "the covariances of its training are not in the folder", UNCHANGE,
         "tuners/lora/layer.py: corda_init"),
    Rule(("peft",), starts("loftq"), _REFUSES,
         "it runs LoftQ again on loading: only with bitsandbytes and a GPU, and on a float base", UNCHANGE,
         "tuners/lora/layer.py: loftq_init"),
    Rule(("vllm",), starts(r"pissa.*|olora|corda|loftq"), _REFUSES, "a start with {found} changed the base", UNCHANGE,
         "lora/peft_helper.py: _init_is_supported"),
    Rule(("vllm",), not_a_start_of(rf"{_PEFT_KNOWS}|pissa.*"), _REFUSES, "it knows no init_lora_weights={found}",
         "set init_lora_weights to true in the config", "lora/peft_helper.py: _init_is_supported"),
    Rule(("vllm",), starts("lora_ga"), _DIFFERS,
         "it takes an unconverted LoRA-GA adapter for plain LoRA on the original base", UNCHANGE,
         "lora/peft_helper.py: _init_is_supported", Effect.PLAIN_START),
    Rule(_READ_PLAIN, starts(CHANGED), _DIFFERS,
         "it passes over init_lora_weights={found}: the factors are added to a base that still holds the start",
         UNCHANGE, "no mention of init_lora_weights", Effect.PLAIN_START),
    # --- variants
    Rule(("vllm", "sglang"), says("use_dora"), _REFUSES, "DoRA is not served", MERGE,
         "vLLM lora/peft_helper.py, SGLang lora_manager.py: validate_new_adapter"),
    Rule(("llama.cpp",), magnitudes, _REFUSES, "DoRA's magnitudes have no place in the file: {found}", MERGE,
         "convert_lora_to_gguf.py: get_tensors"),
    Rule(("lorax",), magnitudes, _DIFFERS, "DoRA's magnitudes are passed over: {found}", MERGE,
         "server/lorax_server/adapters/lora.py: map_weights_for_model", Effect.NO_MAGNITUDE),
    Rule(("peft",), magnitude_untold, _DIFFERS, "the config says no use_dora, and the magnitudes are passed over: "
         "{found}", "set use_dora to true in the config", "unexpected keys are passed over", Effect.NO_MAGNITUDE),
    Rule(("peft",), without_magnitude, _DIFFERS, "the config says use_dora, and the file has no magnitudes: it takes "
         "those of the base for {found}", "set use_dora to false in the config if it was trained without",
         "tuners/lora/dora.py"),
    Rule(("vllm",), says("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
         _REFUSES, "{found} is not served", MERGE, "lora/peft_helper.py: _validate_features"),
    Rule(("sglang", "lorax"), says("lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora"),
         _DIFFERS, "{found} is passed over", MERGE, "no mention of the field"),
    Rule(("vllm",), lambda s: [] if s.raw.get("bias") in (None, "none") else [f"bias={s.raw['bias']!r:.20}"],
         _REFUSES, "{found}: trained biases are not served", MERGE, "lora/peft_helper.py: validate_legal"),
    # --- tensors beside the factors
    Rule(("vllm",), lambda s: [m for m in s.config.get("modules_to_save") or () if m not in ("classifier", "score")],
         _REFUSES, "whole modules are served for classification only: modules_to_save holds {found}", MERGE,
         "lora/peft_helper.py: _validate_features"),
    Rule(("vllm",),
         tensors("", but=r"\.(embed_tokens|lm_head)\.base_layer\.weight$|\.(score|classifier)\.(weight|bias)$"),
         _REFUSES, "{found}: is unsupported LoRA weight", MERGE, "lora/utils.py: parse_fine_tuned_lora_name"),
    Rule(("sglang",), tensors(r"\.layers\.\d+\."), _REFUSES, "tensors that are no factors: {found}", MERGE,
         "lora/utils.py: get_target_module_name"),
    Rule(("sglang",), tensors("", but=rf"\.layers\.\d+\.|{_BESIDE}"), _DIFFERS,
         "what was trained beside the factors is passed over: {found}", MERGE, "lora/lora.py: _process_weight"),
    Rule(("lorax",), tensors("", but=_BESIDE), _DIFFERS,
         "what was trained beside the factors is passed over: {found}", MERGE,
         "server/lorax_server/adapters/lora.py: map_weights_for_model"),
    Rule(("llama.cpp",), tensors("", but=r"\.base_layer\.weight|_layernorm|\.norm"), _REFUSES,
         "a tensor that is no factor ends the conversion: {found}", MERGE, "convert_lora_to_gguf.py: get_tensors"),
    Rule(("peft",), unaccounted, _DIFFERS,
         "tensors that the config does not tell of replace the model's own where they bear its names: {found}",
         "remove them from the file, or name them in modules_to_save", "utils/save_and_load.py"),
    Rule(("peft",), unsaved, _REFUSES, "modules_to_save names what the file has nothing of, and it "
         "fails where the base has a module of that name: {found}",
         "save it again where it was trained, or remove the names", "utils/save_and_load.py: KeyError"),
    # --- shapes and names
    Rule(("peft", "vllm"), other_rank_than_stated, _REFUSES,
         "the config states another rank than the tensors have: {found}",
         "write the tensors' own rank into the config, and lora_alpha with it", "size mismatch on loading"),
    Rule(("sglang",), other_rank_than_r, _REFUSES,
         "it reads no rank_pattern, and its buffers have the rank r: {found} do not fit", PORTABLE,
         "lora/mem_pool.py: load_lora_weight_to_buffer"),
    Rule(("vllm",), rank_above(512), _REFUSES, "{found}, and --max-lora-rank ends at 512",
         "hs.save(model, 'fixed', rank=512), or merge", "config/lora.py: MaxLoRARanks"),
    Rule(("vllm",), rank_above(16), _LOADS, "{found}: start it with --max-lora-rank of that much or more (default 16)",
         "", "config/lora.py: max_lora_rank"),
    Rule(("sglang",), rank_above(16), _LOADS, "{found}: where adapters are added later, --max-lora-rank must allow it",
         "", "lora/mem_pool.py: can_support"),
    Rule(("vllm", "sglang"), lacks("r", "lora_alpha", "target_modules"), _REFUSES, "the config has no {found}",
         "write it into the config", "vLLM lora/peft_helper.py: from_dict, SGLang lora/lora_config.py"),
    Rule(("llama.cpp",), lacks("lora_alpha"), _REFUSES, "the config has no {found}", "write it into the config",
         "convert_lora_to_gguf.py"),
    Rule(("peft", "lorax"), lacks("r", "lora_alpha"), _DIFFERS, "the config has no {found}: it takes 8",
         "write it into the config", "tuners/lora/config.py"),
    Rule(("peft",), untargeted, _DIFFERS, "the config does not target what the file has factors for, and they are "
         "passed over: {found}", "name the layers in target_modules", "tuners/tuners_utils.py", Effect.DROPPED),
    Rule(("peft",), without_prefix, _DIFFERS, "names without 'base_model.model.' are passed over: {found}", PORTABLE,
         "utils/save_and_load.py", Effect.DROPPED),
    Rule(("lorax",), without_prefix, _DIFFERS, "names without 'base_model.model.' are passed over: {found}", PORTABLE,
         "server/lorax_server/adapters/lora.py: map_weights_for_model", Effect.DROPPED),
    Rule(("peft", "lorax"), lambda s: s.halves, _DIFFERS, "half a pair has no effect: {found}", "save it again",
         "missing keys are a warning"),
    Rule(("vllm", "sglang", "llama.cpp"), lambda s: s.halves, _REFUSES, "half a pair: {found}", "save it again",
         "a missing factor fails on loading"),
    Rule(("sglang",), targets_no_list, _REFUSES, "{found}: it takes a list, 'all' or 'all-linear'", PORTABLE,
         "lora/lora_manager.py: init_lora_shapes"),
    Rule(("sglang",), query_without_value, _REFUSES, "it stacks query, key and value, and no value is adapted beside "
         "{found}", PORTABLE, "lora/lora.py: normalize_qkv_proj"),
    Rule(("sglang",), added_tokens, _LOADS, "{found}: refused where it names tokens beyond the base's vocabulary",
         "remove the file where it adds none", "lora/lora_manager.py: validate_new_adapter"),
    Rule(("lorax",), rank_to_pad, _DIFFERS, "on a GPU it pads {found} to 8 or a multiple of 16, and scales every kind "
         "of layer by the padded rank of the kind before", PORTABLE,
         "server/lorax_server/adapters/lora.py: LoraWeights.load"),
    Rule(("lorax",), uneven_kinds, _REFUSES, "it stacks the blocks of a kind of layer, and their ranks differ: "
         "{found}", PORTABLE, "server/lorax_server/adapters/lora.py: LoraWeights.__init__"),
    Rule(("lorax",), some_layers_only, _DIFFERS, "a kind of layer that is not adapted in every block is left out "
         "everywhere: {found}", PORTABLE, "server/lorax_server/adapters/lora.py: LoraWeights.load", Effect.DROPPED),
    Rule(("lorax",), embeddings, _DIFFERS, "embeddings are passed over: {found}", MERGE,
         "server/lorax_server/adapters/lora.py: map_weights_for_model", Effect.DROPPED),
    Rule(("llama.cpp",), heads, _LOADS, "{found}: refused where the base ties it to the embedding",
         "leave it out of target_modules", "convert_lora_to_gguf.py: modify_tensors"),
    Rule(("llama.cpp",), no_base_name, _LOADS, "the config has no {found}: pass --base", "", "convert_lora_to_gguf.py"),
    # --- other formats
    Rule(("diffusers",), starts(r"pissa.*|olora"), _DIFFERS, "it runs {found} again on your pipeline, and leaves it "
         "changed after the adapter is deleted", "remove init_lora_weights from the metadata",
         "loaders/lora_base.py: lora_adapter_metadata"),
)  # fmt: skip
