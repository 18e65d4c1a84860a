"""SAEs of strangers, against the real SAELens: their numbers are SAELens' own, or they are refused by name."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import load_sae, read_config, read_recipe, save_sae
from routesae.train.folder.convert import convert
from routesae.train.folder.strangers import LOADERS
from routesae.train.saes import SAE, Recipe, build
from routesae.train.settings import ConvertSettings


@pytest.fixture(autouse=True, scope="module")
def import_sae_lens() -> None:
    """Here, since its import takes seconds, in every process that collects these tests."""
    global sae_lens
    sae_lens = pytest.importorskip("sae_lens")


N, D, F, K = 40, 8, 24, 4
CPU = torch.device("cpu")
HOOK = "blocks.11.hook_resid_post"
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cpu",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": HOOK, "model_name": "gpt2"},
}


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * 5 + 2


def weights(architecture: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {"gated": ["b_gate", "b_mag", "r_mag"], "jumprelu": ["b_enc", "threshold"]}.get(architecture, ["b_enc"])
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), **dict.fromkeys(names, (F,))}
    drawn = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}
    return {name: tensor.abs() if name == "threshold" else tensor for name, tensor in drawn.items()}


def folder_of(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({**CONFIG, **config}))
    return path


def latents_of(sae: SAE) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of the rows, in the LM's own units."""
    latents = sae.encode(rows())
    return latents.dense(), sae.decode(latents)


def assert_same(ours: SAE, theirs: Any) -> None:
    with torch.no_grad():
        f_NF = theirs.encode(rows())
        x_ND = theirs.decode(f_NF)
    assert (f_NF > 0).any()
    found_NF, found_ND = latents_of(ours)
    torch.testing.assert_close(found_NF, f_NF, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_ND, x_ND, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------ obeyed or refused


def random_folder(path: Path, rng: random.Random) -> Path:
    """A folder such as other tools or versions write, right or strange in a few places."""
    architecture = rng.choice(["standard", "gated", "topk", "jumprelu"])
    config: dict[str, Any] = {"architecture": architecture}
    tensors = weights(architecture, rng.randrange(1000))
    common: dict[str, list[Any]] = {
        "apply_b_dec_to_input": [True, False],
        "normalize_activations": ["none", "layer_norm"],
        "rescale_acts_by_decoder_norm": [True, False],
        "k": [K],
        "reshape_activations": ["none"],
    }
    strange: dict[str, list[Any]] = {
        "normalize_activations": ["expected_average_only_in", "constant_norm_rescale", None],
        "reshape_activations": ["hook_z"],
        "activation_fn_str": ["relu", "tanh-relu"],
        "activation_fn": ["relu", "topk"],
        "activation_fn_kwargs": [{}, {"k": 3}],
        "finetuning_scaling_factor": [False, True],
        "hook_head_index": [None, 3],
        "d_sae": [F, F - 1],
        "threshold": [0.5],
        "skip_connection": [True],
    }
    for name, values in common.items():
        if rng.random() < 0.5:
            config[name] = rng.choice(values)
    if rng.random() < 0.4:
        name = rng.choice(list(strange))
        config[name] = rng.choice(strange[name])
    if architecture == "jumprelu" and rng.random() < 0.3:
        tensors["threshold"] -= 0.5
    if rng.random() < 0.15:
        tensors[rng.choice(["scaling_factor", "b_skip", "finetuning_scaling_factor"])] = torch.full((F,), 3.0)
    if rng.random() < 0.1:
        tensors["W_dec"][3] = rng.choice([0.0, float("nan"), float("inf")])
    metadata = dict(CONFIG["metadata"])
    if rng.random() < 0.1:
        metadata |= rng.choice([{"hook_head_index": 2}, {"hook_name_out": "blocks.12.hook_mlp_out"}])
    return folder_of(path, tensors, **config, metadata=metadata)


def test_any_configuration_gives_saelens_own_numbers_or_is_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    obeyed, messages = 0, []
    for at in range(300):
        folder = random_folder(tmp_path / str(at), rng)
        try:
            ours = load_sae(folder, CPU)
        except WrongInput as error:
            messages.append(str(error).replace(str(folder), "FOLDER"))
            continue
        obeyed += 1
        theirs = sae_lens.SAE.load_from_disk(folder, device="cpu")
        assert_same(ours, theirs)
    assert min(obeyed, len(messages)) > 80
    assert all("FOLDER" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"scaling_factor": torch.full((F,), 3.0)},
            {"finetuning_scaling_factor": True},
            "finetuning_scaling_factor True",
        ),
        ({"scaling_factor": torch.full((F,), 3.0)}, {}, "sae_weights.safetensors holds scaling_factor"),
        ({}, {"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu'"),
        ({}, {"activation_fn_kwargs": {"k": 5}}, r"activation_fn_kwargs \{'k': 5\}"),
        ({}, {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({}, {"hook_head_index": 3}, "hook_head_index 3"),
        ({}, {"metadata": {**CONFIG["metadata"], "hook_head_index": 3}}, "metadata.hook_head_index 3"),
        ({"W_dec": torch.full((F, D), torch.nan)}, {}, "W_dec holds NaN or infinite values"),
        ({"b_enc": torch.full((F,), torch.inf)}, {}, "b_enc holds NaN or infinite values"),
    ],
    ids=str,
)
def test_what_would_change_the_numbers_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    folder = folder_of(tmp_path / "sae", {**weights("standard"), **tensors}, **config)
    with pytest.raises(WrongInput, match=message):
        load_sae(folder, CPU)


def test_topk_without_k_has_saelens_default(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    f = 128
    tensors = {
        "W_enc": torch.randn(D, f),
        "W_dec": torch.randn(f, D),
        "b_enc": torch.randn(f),
        "b_dec": torch.randn(D),
    }
    folder_of(folder, tensors, architecture="topk", d_sae=f)
    assert read_recipe(folder).k == sae_lens.SAE.load_from_disk(folder).cfg.k == 100


def test_a_zero_decoder_row_makes_no_nan(tmp_path: Path) -> None:
    tensors = weights("topk")
    tensors["W_dec"][3] = 0
    for rescale in (True, False):
        folder = folder_of(
            tmp_path / str(rescale), tensors, architecture="topk", k=K, rescale_acts_by_decoder_norm=rescale
        )
        latents_NF, reconstruction_ND = latents_of(load_sae(folder, CPU))
        assert bool(latents_NF.isfinite().all() & reconstruction_ND.isfinite().all())


def test_an_lm_that_was_centred_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"center_writing_weights": True, "fold_ln": False}
    folder = folder_of(
        tmp_path / "sae", weights("standard"), metadata={**CONFIG["metadata"], "model_from_pretrained_kwargs": kwargs}
    )
    load_sae(folder, CPU)
    assert "center_writing_weights=True" in caplog.text
    assert "fold_ln" not in caplog.text


# --------------------------------------------------------------------------------- ours, changed by SAELens


def ours_in(folder: Path, name: str, **recipe: Any) -> Path:
    sae = build(Recipe(sae=name, layers=(12,), width=D, latents=F, k=K, **recipe))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.5)
        for key, buffer in sae.named_buffers():
            if key.endswith("threshold"):
                buffer.fill_(0.5)
    folder.mkdir()
    save_sae(folder, sae.eval(), {})
    return folder


def raise_thresholds(theirs: Any) -> None:
    theirs.threshold.data += torch.linspace(0, 2, F)


def fewer(theirs: Any) -> None:
    theirs.cfg.k = 2


def rescale(theirs: Any) -> None:
    theirs.cfg.rescale_acts_by_decoder_norm = True


def from_raw_input(theirs: Any) -> None:
    theirs.cfg.apply_b_dec_to_input = False


def raw(theirs: Any) -> None:
    theirs.cfg.normalize_activations = "none"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("batchtopk", raise_thresholds),
        ("matryoshka", raise_thresholds),
        ("topk", fewer),
        ("topk", rescale),
        ("vanilla", from_raw_input),
        ("jumprelu", raw),
    ],
)
def test_an_sae_of_ours_that_saelens_changed_is_refused_and_convert_makes_one_of_what_it_is_now(
    tmp_path: Path, name: str, change: Callable[[Any], None]
) -> None:
    theirs = sae_lens.SAE.load_from_disk(ours_in(tmp_path / "ours", name), device="cpu")
    change(theirs)
    theirs.save_model(tmp_path / "again")
    again = sae_lens.SAE.load_from_disk(tmp_path / "again", device="cpu")
    with pytest.raises(WrongInput, match=r"again.* is not what was saved; .*routesae convert"):
        load_sae(tmp_path / "again", CPU)
    folder = convert(ConvertSettings(file=str(tmp_path / "again"), out=str(tmp_path), name="now")).folder
    assert_same(load_sae(folder, CPU), again)


@pytest.mark.parametrize("name", ["vanilla", "gated", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_an_sae_of_ours_that_saelens_saved_unchanged_keeps_its_recipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = ours_in(tmp_path / "ours", name)
    sae_lens.SAE.load_from_disk(folder, device="cpu").save_model(tmp_path / "again")
    assert read_recipe(tmp_path / "again") == read_recipe(folder)
    assert caplog.text == ""


# ----------------------------------------------------------------------------------------------- other layouts


def gemma_scope(folder: Path) -> None:
    tensors = weights("jumprelu")
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    np.savez(folder / "params.npz", **{names.get(name, name): tensor.numpy() for name, tensor in tensors.items()})


def llama_scope(folder: Path) -> None:
    tensors = weights("standard")
    (folder / "checkpoints").mkdir()
    saved = {"encoder.weight": tensors["W_enc"].T, "decoder.weight": tensors["W_dec"].T}
    saved |= {"encoder.bias": tensors["b_enc"], "decoder.bias": tensors["b_dec"]}
    save_file({name: t.contiguous() for name, t in saved.items()}, folder / "checkpoints" / "final.safetensors")
    hyper = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.6, "hook_point_in": "blocks.9.hook_resid_post"}
    hyper["dataset_average_activation_norm"] = {"in": 16.0}
    (folder / "hyperparams.json").write_text(json.dumps(hyper))


def sparsify(folder: Path) -> None:
    tensors = weights("topk")
    saved = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"]}
    saved |= {"decoder.weight": tensors["W_dec"].T, "b_dec": tensors["b_dec"]}
    save_file({name: t.contiguous() for name, t in saved.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": K, "signed": False}))


def dictionary_learning(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        architecture = {"GatedAutoEncoder": "gated", "JumpReluAutoEncoder": "jumprelu"}.get(kind, "standard")
        tensors = weights(architecture)
        saved = {"encoder.weight": tensors["W_enc"].T, "decoder.weight": tensors["W_dec"].T, "bias": tensors["b_dec"]}
        if kind == "JumpReluAutoEncoder":
            saved = {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")}
        elif kind == "GatedAutoEncoder":
            saved["decoder_bias"] = saved.pop("bias")
            saved |= {"mag_bias": tensors["b_mag"], "gate_bias": tensors["b_gate"], "r_mag": tensors["r_mag"]}
        else:
            saved["encoder.bias"] = tensors["b_enc"]
        if kind in ("BatchTopKSAE", "AutoEncoderTopK"):
            saved["threshold"] = torch.tensor(0.7)
        torch.save(saved, folder / "ae.pt")
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 9, "lm_name": "x/gpt2", "k": K}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))

    return write


LAYOUTS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "gemma scope": ("gemma_2", "gemma-scope-2b-pt-res/layer_9/width_16k/average_l0_7", gemma_scope),
    "llama scope": ("llama_scope", "Llama3_1-8B-Base-L9R-8x", llama_scope),
    "sparsify": ("sparsify", "sae-llama/layers.9", sparsify),
    **{
        kind: ("dictionary_learning_1", f"resid_post_layer_9/{kind}", dictionary_learning(kind))
        for kind in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder", "JumpReluAutoEncoder")
    },
}


def by_saelens(monkeypatch: pytest.MonkeyPatch, root: Path, loader: str, name: str) -> Any:
    """SAELens' own from_pretrained, its downloads taken from `root`; only the sizes are those of tiny files."""
    loaders = importlib.import_module(LOADERS)

    def fitted(**options: Any) -> Any:
        config, state, rest = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](**options)
        return {**config, "d_in": state["W_enc"].shape[0], "d_sae": state["W_enc"].shape[1]}, state, rest

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(root / subfolder / filename)

    with monkeypatch.context() as patched:
        patched.setattr(loaders, "hf_hub_download", download)
        repo, _, folder = name.partition("/") if loader == "gemma_2" else ("me/x", "", name)
        sae, _, _ = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(
            f"google/{repo}" if loader == "gemma_2" else repo, folder, device="cpu", converter=fitted
        )
    return sae


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_other_layouts_become_sae_folders_with_saelens_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    loader, name, write = LAYOUTS[layout]
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write(folder)
    root = tmp_path / "gemma-scope-2b-pt-res" if loader == "gemma_2" else tmp_path
    theirs = by_saelens(monkeypatch, root, loader, name)
    if layout == "llama scope":
        theirs.fold_activation_norm_scaling_factor(D**0.5 / 16.0)  # as its entry in SAELens' list says
    with pytest.raises(WrongInput, match=rf"routesae convert {folder}"):
        load_sae(folder, CPU)
    done = convert(ConvertSettings(file=str(folder), out=str(tmp_path / "saes"), name="mine"))
    assert done.recipe.layers == (10,)
    assert_same(load_sae(done.folder, CPU), theirs)
    assert read_config(done.folder)["metadata"]["routesae"]["source"]["converted"] == {"file": str(folder)}


def test_sparsify_files_with_a_decoder_of_their_own_shape_are_read(tmp_path: Path) -> None:
    """sparsify saves W_dec as [F, D]; SAELens' loader transposes that and then fails."""
    folder = tmp_path / "layers.9"
    folder.mkdir()
    sparsify(folder)
    saved = load_file(folder / "sae.safetensors")
    saved["W_dec"] = saved.pop("decoder.weight").T.contiguous()
    other = tmp_path / "other" / "layers.9"
    other.mkdir(parents=True)
    (other / "cfg.json").write_text((folder / "cfg.json").read_text())
    save_file(saved, other / "sae.safetensors")
    made = [
        convert(ConvertSettings(file=str(f), out=str(tmp_path / f"saes{i}"))) for i, f in enumerate((folder, other))
    ]
    assert torch.equal(*(latents_of(load_sae(done.folder, CPU))[1] for done in made))


@pytest.mark.filterwarnings("ignore")
def test_a_name_of_saelens_list_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = importlib.import_module(LOADERS)
    folder = tmp_path / "me" / "x" / "layers.9"
    folder.mkdir(parents=True)
    folder_of(folder, weights("jumprelu"), architecture="jumprelu")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        path = tmp_path / repo_id / filename
        if not path.exists():
            raise EntryNotFoundError(str(path))
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    done = convert(ConvertSettings(file="lens:me/x/layers.9", out=str(tmp_path / "saes")))
    assert done.folder == tmp_path / "saes" / "x_layers.9"
    assert_same(load_sae(done.folder, CPU), sae_lens.SAE.load_from_disk(folder, device="cpu"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("lens:gpt2-small-res-jb", "names no SAE; give lens:RELEASE/ID"),
        ("lens:gpt2-small-res-jb/blocks.99", "ID blocks.99 not found in release gpt2-small-res-jb"),
    ],
)
def test_a_reference_that_saelens_does_not_know_is_one_line(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(WrongInput, match=message) as refused:
        convert(ConvertSettings(file=reference, out=str(tmp_path), name="x"))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_saelens_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WrongInput, match=r"needs sae_lens: pip install 'routesae\[lens\]'"):
        convert(ConvertSettings(file="lens:a/b", out=str(tmp_path), name="x"))
