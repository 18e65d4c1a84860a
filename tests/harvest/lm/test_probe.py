"""An LM that cannot be harvested and scored is refused before a corpus is read; one that can proves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.harvest.cache.inspect import describe
from routesae.harvest.lm.model import LanguageModel, find_blocks, load_lm, load_tokenizer
from routesae.harvest.lm.probe import prove
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput

Settings = Callable[..., HarvestSettings]
CPU = torch.device("cpu")
HEADS = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def config(name: str, **more: Any) -> Any:
    import transformers

    kind: Any = getattr(transformers, f"{name}Config")
    return kind(**more)


def llama(**more: Any) -> Any:
    return config("Llama", **HEADS, num_key_value_heads=2, **more)


def built(of: Any) -> LanguageModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(of, dtype=torch.float32).eval().requires_grad_(False)
    return LanguageModel(model, find_blocks(model, "m"), of.get_text_config().hidden_size, CPU)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def proved(
    lm: LanguageModel, tokenizer: Any, *, layers: tuple[int, ...] = (1, 2, 3), context: int = 32
) -> int | None:
    return prove(lm, "m", tokenizer, layers, context)


# --------------------------------------------------------------------------------------------------- that may pass


@pytest.mark.parametrize(
    ("of", "offset"),
    [
        (lambda: llama(), 0),
        (
            lambda: config(
                "Llama4Text",
                **{
                    **HEADS,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "intermediate_size_mlp": 48,
                    "num_local_experts": 4,
                },
                attention_chunk_size=16,
                interleave_moe_layer_step=2,
                no_rope_layers=[1, 1, 1, 0],
            ),
            0,
        ),  # get_decoder() is not the body
        (lambda: config("Bamba", **HEADS, num_key_value_heads=2, attn_layer_indices=[1], **MAMBA, mamba_expand=2), 0),
        (
            lambda: config(
                "Rwkv",
                vocab_size=320,
                hidden_size=32,
                attention_hidden_size=32,
                num_hidden_layers=4,
                context_length=64,
            ),
            -1,
        ),  # triples, and hidden_states without the embedding
        (lambda: config("ModernBertDecoder", **{**HEADS, "pad_token_id": 1}), 0),  # get_decoder() is its last matrix
        (lambda: config("OpenAIGPT", vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=64), 0),  # lists
        (lambda: config("Mixtral", **HEADS, num_key_value_heads=2, num_local_experts=4), 0),
        (lambda: config("OPT", **{**HEADS, "word_embed_proj_dim": 32, "ffn_dim": 48}), 0),
    ],
    ids=["llama", "llama4", "bamba", "rwkv", "modernbert-decoder", "openai-gpt", "mixtral", "opt"],
)
def test_an_lm_that_can_be_harvested_and_scored_proves_it(of: Callable[[], Any], offset: int, tokenizer: Any) -> None:
    lm = built(of())
    assert proved(lm, tokenizer) == offset
    assert proved(lm, tokenizer, layers=(4,)) == offset


def test_the_manifest_and_cache_info_say_where_transformers_has_a_layer(
    tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    rwkv = config(
        "Rwkv", vocab_size=320, hidden_size=32, attention_hidden_size=32, num_hidden_layers=4, context_length=64
    )
    built(rwkv).model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "model")
    for model, said in ((tmp_path / "model", "hidden_states[ℓ-1]"), (tiny_model, "hidden_states[ℓ]")):
        out = tmp_path / model.name
        harvest(tiny_settings(model=str(model), out=str(out / "shards"), tokens=640, layers="2"))
        assert said in describe(str(out / "shards")).facts["layer ℓ"]


# ------------------------------------------------------------------------------------------------ that is refused


def without_down(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name != "model.layers.2.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_down, r"the weights of .* lack model\.layers\.2\.mlp\.down_proj\.weight; random numbers"),
        (
            lambda weights: {f"wrapped.{name}": weight for name, weight in weights.items()},
            r"lack lm_head\.weight and \d+ more",
        ),
        (
            lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"][:-1].clone()},
            r"another shape than its configuration: .*model\.norm\.weight",
        ),
    ],
    ids=["a tensor missing", "a prefix", "a shape"],
)
def test_weights_that_are_not_all_there_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path, capfd: Any
) -> None:
    built(llama()).model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(WrongInput, match=message) as refused:
        load_lm(str(tmp_path), device=CPU, lm_dtype="float32")
    assert "\n" not in str(refused.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda: config("Bert", **{**HEADS, "pad_token_id": 1}), "block 3 sees the tokens after each token"),
        (lambda: llama(is_causal=False), "block 3 sees the tokens after each token"),
        (
            lambda: config(
                "CpmAnt",
                vocab_size=320,
                hidden_size=32,
                num_attention_heads=4,
                dim_head=8,
                dim_ff=48,
                num_hidden_layers=4,
            ),
            r"block 1 returns \[\(2, 48, 32\)\] for \[2, 16\] tokens",
        ),
        (
            lambda: config("XLNet", vocab_size=320, d_model=32, n_layer=4, n_head=4, d_inner=48),
            r"block 1 returns \[\(16, 2, 32\)\] for \[2, 16\] tokens",
        ),
    ],
    ids=["an encoder", "is_causal: false", "prompts before the tokens", "positions first"],
)
def test_an_lm_that_does_something_else_is_refused_in_one_line(
    of: Callable[[], Any], message: str, tokenizer: Any
) -> None:
    with pytest.raises(WrongInput, match=rf"m \(\w+\) cannot be harvested: {message}") as refused:
        proved(built(of()), tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "of",
    [lambda: config("Bert", **{**HEADS, "pad_token_id": 1}), lambda: llama(is_causal=False)],
    ids=["an encoder", "is_causal: false"],
)
def test_what_tokens_see_of_later_ones_is_found_below_the_precision_of_bfloat16(
    of: Callable[[], Any], tokenizer: Any
) -> None:
    """With small random weights attention moves a hidden state by less than bfloat16 rounds the whole state."""
    lm = built(of())
    lm.model.to(torch.bfloat16)
    with pytest.raises(WrongInput, match="sees the tokens after each token"):
        proved(lm, tokenizer)


def test_a_causal_lm_in_bfloat16_proves_itself(tokenizer: Any) -> None:
    for of in (llama(), config("Mixtral", **HEADS, num_key_value_heads=2, num_local_experts=4)):
        lm = built(of)
        lm.model.to(torch.bfloat16)
        assert proved(lm, tokenizer) == 0


def test_a_block_that_runs_twice_or_ignores_what_stands_in_its_place_is_refused(tokenizer: Any) -> None:
    lm = built(llama())

    def run_the_first_again(block: Any, inputs: Any, more: Any) -> None:
        lm.blocks[0](*inputs, **more)

    lm.blocks[1].register_forward_pre_hook(run_the_first_again, with_kwargs=True)
    with pytest.raises(WrongInput, match=r"block 1 returns \[\(2, 16, 32\), \(2, 16, 32\)\]"):
        proved(lm, tokenizer)
    lm = built(llama())
    kept: list[Tensor] = []
    lm.blocks[0].register_forward_hook(lambda block, inputs, output: kept.append(output))
    lm.model.model.norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0] * 0 + kept[-1],))
    with pytest.raises(WrongInput, match="so it cannot be scored"):
        proved(lm, tokenizer)


def test_an_lm_that_returns_nan_is_refused(tokenizer: Any) -> None:
    lm = built(llama())
    lm.blocks[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(WrongInput, match="block 2 returns NaN or infinite values"):
        proved(lm, tokenizer)


def test_a_forward_pass_that_fails_is_refused_in_one_line(tokenizer: Any) -> None:
    lm = built(llama())
    lm.model.model.norm.register_forward_pre_hook(lambda norm, inputs: 1 / 0)
    with pytest.raises(WrongInput, match="its forward pass fails with ZeroDivisionError: division by zero"):
        proved(lm, tokenizer)


@pytest.mark.parametrize(
    ("of", "key"),
    [
        (lambda: config("Mpt", vocab_size=320, d_model=32, n_layers=4, n_heads=4, max_seq_len=32), "max_seq_len"),
        (lambda: config("GPT2", vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=32), "n_positions"),
        (lambda: config("Llama", **{**HEADS, "max_position_embeddings": 32}), "max_position_embeddings"),
    ],
)
def test_a_context_beyond_the_positions_is_refused_whatever_they_are_called(
    of: Callable[[], Any], key: str, tokenizer: Any
) -> None:
    lm = built(of())
    proved(lm, tokenizer, context=32)
    with pytest.raises(WrongInput, match=rf"--context 33 is more than the 32 positions that m has \({key}\)"):
        proved(lm, tokenizer, context=33)


def test_a_context_beyond_a_table_of_positions_that_no_name_tells_of_is_refused(tokenizer: Any) -> None:
    lm = built(config("GPT2", vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=32))
    lm.model.config.n_positions = 1024
    with pytest.raises(WrongInput, match="cannot be harvested: its forward pass fails with IndexError"):
        proved(lm, tokenizer, context=33)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused_before_the_corpus_is_looked_at(
    tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    large = load_tokenizer(str(tiny_model))
    rows = len(large)
    large.add_special_tokens({"eos_token": "<|im_end|>"})
    built(config("Llama", **{**HEADS, "vocab_size": rows})).model.save_pretrained(tmp_path / "model")
    large.save_pretrained(tmp_path / "model")
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(
        WrongInput, match=rf"has the id {rows} \('<\|im_end\|>'\), but the embedding has only {rows} rows"
    ):
        harvest(
            tiny_settings(
                model=str(tmp_path / "model"), data=str(tmp_path / "none.jsonl"), out=str(tmp_path / "o"), layers="1"
            )
        )
    assert not (tmp_path / "o").exists()
