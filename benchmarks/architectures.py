"""Harvest and score every causal LM of transformers, small and with random weights, or see it refused in one line.

    nice -n 15 python benchmarks/architectures.py            # prints the table of benchmarks/RESULTS.md
    python benchmarks/architectures.py llama mamba           # just these

A configuration is the architecture's default with every size made small. Each model runs in a forked process: it is
saved with a tokenizer of bytes, harvested at every layer, and a topk SAE of random weights
is scored by KLDiv on it. "refused" is one line with exit code 2; anything else is a failure of routesae.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, WrongInput
from routesae.train.run import train
from routesae.train.settings import RunSettings, TrainSettings

SECONDS = 400  # for one architecture
VOCABULARY, CONTEXT = 320, 16
# Sizes by the names that configurations have for them; the first pattern that matches counts.
SMALL: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?|n_vocab", VOCABULARY),
    (r"(num_hidden|num|n|num_decoder|decoder|encoder)_layers?|num_blocks|num_layers", 4),
    (r"(linear_|mamba_)?(num|n)_(key_value|kv|query_groups)_heads?|multi_query_group_num|num_kv_heads", 2),
    (r"mamba_(n|num)_heads|mamba_num_heads|ssm_num_heads", 8),
    (r"mamba_(d_head|head_dim)|mamba_headdim", 8),
    (r"mamba_(d_state|d_ssm)|state_size|ssm_state_size", 8),
    (r"(mamba_)?n_groups|mamba_ngroups", 1),
    (r"(mamba_)?chunk_size|attention_chunk_size", 8),
    (r"(num|n)_\w*heads?|num_attention_heads|\w*attention_heads", 4),
    (r"(\w+_)?(num|n)_\w*experts(_per_tok|_per_token)?\w*|num_local_experts|moe_num_experts|num_experts", None),
    (r"(global_|qk_rope_|qk_nope_|v_|qk_|swa_|index_)?head_dim|kv_channels|\w+_key_head_dim|\w+_value_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|\w*lora_rank\w*|\w*_rank", 16),
    (
        r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|emb_dim|lru_width|attention_hidden_size",
        32,
    ),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|dim_ff|\w*intermediate_size\w*|ffn_hidden_size|\w*ffn_dim", 48),
    (r"n_group|topk_group|num_expert_group|n_groups", 1),
    (r"sliding_window|attention_window_size|local_attention|window_size", 8),
    (r"first_k_dense_replace|moe_layer_start_index|mlp_only_layers", 1),
    (r"(max|n)_positions?(_embeddings)?|n_ctx|max_seq_len|context_length|model_max_length", 64),
    (r"pad_token_id", 1),
    (r"bos_token_id", 0),
    (r"eos_token_id", 1),
)
EXPERTS, ACTIVE_EXPERTS = 4, 2
DROPPED = ("architectures", "model_type", "transformers_version", "per_layer_config", "layers_block_type")
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_expand": 2}
# What an architecture wants besides.
EXTRA: dict[str, dict[str, Any]] = {
    "falcon_h1": _MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "num_hidden_layers": 2,
    },
    "xlnet": {"d_head": 8},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "xlstm": {"embedding_dim": 32, "hidden_size": 32, "num_blocks": 4, "num_heads": 2, "head_dim": 32},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "llama4_text": {"pad_token_id": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_expand": 2},
}


def small_config(model_type: str) -> Any:
    """The default configuration of an architecture with every size made small."""
    default = CONFIG_MAPPING[model_type]().to_dict()
    return CONFIG_MAPPING[model_type](**{**shrunk_fields(default), **EXTRA.get(model_type, {})})


def shrunk_fields(fields: dict[str, Any]) -> dict[str, Any]:
    small = {name: shrunk(name, value) for name, value in fields.items() if name not in DROPPED}
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
        small["num_key_value_heads"] = small.get("num_attention_heads")
    return small


def shrunk(name: str, value: Any) -> Any:
    """A field of a default configuration, small."""
    if isinstance(value, dict) and "model_type" in value:
        return {**shrunk_fields(value), "model_type": value["model_type"]}
    if isinstance(value, list) and len(value) > 4:
        return value[:4]
    if type(value) is not int:
        return value
    for pattern, size in SMALL:
        if re.fullmatch(pattern, name):
            if "experts" in pattern:
                return min(value, ACTIVE_EXPERTS if "per_tok" in name else EXPERTS)
            return size if name.endswith("_id") else min(value, size)
    return value


def save(folder: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    letters = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def tried(folder: Path, model_type: str) -> str:
    """What becomes of an architecture, for the table; "not built" if transformers itself cannot run the model."""
    os.chdir(folder)
    try:
        config = small_config(model_type)
        save(folder / "model", config)
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        model(input_ids=torch.zeros(1, CONTEXT, dtype=torch.int64), use_cache=False)
    except Exception as error:  # transformers' own: a configuration that nobody has made small
        return f"not built: {type(error).__name__}: {first_line(error)}"
    words = random.Random(0).choices(["the", "router", "reads", "a", "hidden", "state"], k=600)
    (folder / "corpus.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
    try:
        cache = harvest(
            HarvestSettings(
                model="model",
                data="corpus.jsonl",
                layers="1-" + str(max(1, config.get_text_config().num_hidden_layers)),
                tokens=2048,
                context=CONTEXT,
                shard_tokens=1024,
                batch_sequences=64,
                device="cpu",
                lm_dtype="float32",
            )
        )
        layer = cache.manifest.layers[len(cache.manifest.layers) // 2]
        run = RunSettings(sae="topk", layer=layer, latents=64, k=8)
        train(TrainSettings(runs=(run,), batch_tokens=512, tokens=512, device="cpu"))
        kl = analyze(AnalyzeSettings(metrics=("KLDiv",), batch_sequences=64, device="cpu"))["saes"][0]["KLDiv"]
        offset = cache.manifest.hidden_states_offset
        place = (
            "nowhere in hidden_states" if offset is None else f"hidden_states[ℓ{f'{offset:+d}' if offset else ''}]"
        )
        return f"harvested and scored: KLDiv {kl:.2g}; layer ℓ is {place}"
    except (WrongInput, FailedRun) as refused:
        return f"refused: {refused}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]


def forked(model_type: str) -> tuple[str, list[str]]:
    """What becomes of an architecture in a process of its own, and the modules that were imported there."""
    with tempfile.TemporaryDirectory() as name:
        folder, answer = Path(name, "work"), Path(name, "answer")
        folder.mkdir()
        if (pid := os.fork()) == 0:
            signal.alarm(SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            answer.write_text("\n".join([tried(folder, model_type), *sys.modules]))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        outcome, *modules = answer.read_text().splitlines() if answer.exists() else [f"FAILED: ended with {status}"]
        return outcome, modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="transformers' model types; all if none is named")
    parser.add_argument("--failed-only", action="store_true", help="print only what went wrong")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    outcomes: dict[str, str] = {}
    for module in forked("llama")[1]:  # what every fork would else import for itself
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    for model_type in args.architectures or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        outcomes[model_type] = forked(model_type)[0]
        kind, _, detail = outcomes[model_type].partition(": ")
        if not args.failed_only or kind == "FAILED":
            print(f"| {model_type} | {kind} | {detail.replace('|', '/')} |", flush=True)
    counts = Counter(outcome.partition(": ")[0] for outcome in outcomes.values())
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    sys.exit(bool(counts["FAILED"]))


if __name__ == "__main__":
    main()
