"""Pico models: random weights, two blocks, 64 wide, saved as real checkpoints of real families.

Each family names what a person reading its architecture expects to be quantised: `sites` counts
the matrices of the whole model by kind. Widths are chosen for their edges: 172 and 40 leave a short
last group at every group size, some heads are tied, some checkpoints are sharded, types differ.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 320
CONTEXT = 128

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MLA: dict[str, Any] = {
    **_BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 40,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Family:
    """One architecture in miniature.

    config: name of its transformers config class. options: what that class is given. sites:
    matrices by kind. dtype: stored type. shard: save_pretrained's max_shard_size. fused: suffixes
    of tensors that hold all experts of a layer in one 3-D tensor on disk. transposed: kinds whose
    matrices lie (in, out) on disk.
    """

    name: str
    config: str
    options: dict[str, Any]
    sites: dict[str, int]
    dtype: str = "bfloat16"
    shard: str = "50GB"
    fused: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()


def _family(name: str, config: str, sites: dict[str, int], **rest: Any) -> Family:
    options = {**rest.pop("base", _BASE), **rest.pop("options", {})}
    return Family(name, config, options, sites, **rest)


_DENSE = {"attention": 8, "mlp": 6}
_EXPERTS = 2 * 4 * 3  # layers, experts, matrices: gate, up and down

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in [
        _family("llama", "LlamaConfig", _DENSE, options={"intermediate_size": 172}),
        _family(
            "qwen2",
            "Qwen2Config",
            _DENSE,
            options={"tie_word_embeddings": True},
            dtype="float16",
        ),
        _family("qwen3", "Qwen3Config", _DENSE, options={"head_dim": 16}, shard="60KB"),
        _family("gemma2", "Gemma2Config", _DENSE, options={"head_dim": 16, "sliding_window": 16}),
        _family(
            "gemma3",
            "Gemma3TextConfig",
            _DENSE,
            options={
                "head_dim": 16,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            dtype="float32",
        ),
        _family("phi3", "Phi3Config", {"attention": 4, "mlp": 4}),
        _family(
            "gpt2",
            "GPT2Config",
            {"attention": 4, "mlp": 4},
            base={},
            options={
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "n_inner": 172,
                "vocab_size": VOCAB,
                "n_positions": CONTEXT,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            dtype="float32",
            transposed=("attention", "mlp"),
        ),
        _family(
            "gptj",
            "GPTJConfig",
            {"attention": 8, "mlp": 4},
            base={},
            options={
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "rotary_dim": 16,
                "vocab_size": VOCAB,
                "n_positions": CONTEXT,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
        ),
        _family(
            "mixtral",
            "MixtralConfig",
            {"attention": 8, "expert": _EXPERTS},
            options={"num_local_experts": 4, "intermediate_size": 40},
            shard="100KB",
        ),
        _family(
            "qwen3_moe",
            "Qwen3MoeConfig",
            {"attention": 8, "expert": _EXPERTS},
            options={
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 40,
            },
        ),
        _family(
            "qwen2_moe",
            "Qwen2MoeConfig",
            {"attention": 8, "expert": _EXPERTS, "shared_expert": 6, "router": 2},
            options={
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 48,
            },
            dtype="float16",
        ),
        _family(
            "olmoe",
            "OlmoeConfig",
            {"attention": 8, "expert": _EXPERTS},
            options={"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
            dtype="float32",
        ),
        _family(
            "deepseek_v2",
            "DeepseekV2Config",
            {"attention": 10, "mlp": 3, "expert": 12, "shared_expert": 3},
            base=_MLA,
        ),
        _family(
            "deepseek_v3",
            "DeepseekV3Config",
            {"attention": 10, "mlp": 3, "expert": 12, "shared_expert": 3},
            base=_MLA,
        ),
        _family(
            "gpt_oss",
            "GptOssConfig",
            {"attention": 8, "expert": 2 * 4 * 2},
            options={
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "intermediate_size": 40,
                "sliding_window": 16,
            },
            fused=("gate_up_proj", "down_proj"),
            transposed=("expert",),
        ),
    ]
}

TIED = frozenset({"qwen2", "gemma2", "gemma3", "gpt2"})  # families whose head is the embedding


@dataclass
class Builder:
    """Saves families as checkpoints under `root`, each variant once.

    tokenizer: saved beside every model.
    """

    root: Path
    tokenizer: Any
    _made: dict[str, Path] = field(default_factory=dict)
    _options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, family: str, variant: str = "", **options: Any) -> Path:
        """The checkpoint of `family`. variant: names a set of changed config `options`."""
        key = f"{family}-{variant}" if variant else family
        if self._options.setdefault(key, options) != options:
            raise ValueError(f"{key} is another model elsewhere: name this variant otherwise")
        if key not in self._made:
            self._made[key] = self.root / key
            save(FAMILIES[family], self._made[key], self.tokenizer, **options)
        return self._made[key]


def build(family: Family, **options: Any) -> Any:
    """The family's model with random weights large enough that experts and biases matter."""
    import torch
    import transformers

    config = getattr(transformers, family.config)(**{**family.options, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if (
            tensor.dim() == 3
            or (tensor.dim() == 2 and "embed" not in name)
            or name.endswith("bias")
        ):
            torch.nn.init.normal_(tensor, std=0.1)
    model.tie_weights()
    return model.to(getattr(torch, family.dtype))


def save(family: Family, path: Path, tokenizer: Any, **options: Any) -> None:
    """Write the family's checkpoint and tokenizer into `path`."""
    build(family, **options).save_pretrained(path, max_shard_size=family.shard)
    tokenizer.save_pretrained(path)


def make_tokenizer(text: str) -> Any:
    """A byte-level BPE of VOCAB tokens, trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def words(count: int, seed: int = 0) -> str:
    """Text of `count` made-up words in lines of twelve, the same for the same seed."""
    rng = random.Random(seed)
    syllables = ["ba", "ke", "lo", "mi", "nu", "ra", "si", "to", "va", "zu"]
    stock = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    chosen = [stock[min(int(rng.expovariate(0.03)), 199)] for _ in range(count)]
    return "\n".join(" ".join(chosen[i : i + 12]) for i in range(0, count, 12)) + "\n"
