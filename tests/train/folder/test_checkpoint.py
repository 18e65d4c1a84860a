"""SAE folders: what is in them, that they come back bit for bit, and that a bad one is refused by name."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file, save_file
from torch import Tensor

from routesae.analyze.inputs.saes import sae_identity
from routesae.reporting import WrongInput
from routesae.tests.hidden import Normalised, normalise_layers
from routesae.train.folder.checkpoint import find_saes, load_sae, read_config, read_recipe, save_sae
from routesae.train.saes import SAE, SAES, SINGLE_LAYER, Recipe, build

L, N, D, LATENTS, K = 3, 30, 8, 24, 4
CPU = torch.device("cpu")
SOURCE = {"model": "some/model", "corpus": "some.jsonl", "context": 16, "held_out": {"norm_mse": 0.25}}
NAMES = ["topk", "hard", "soft"]
SINGLES = [name for name in SINGLE_LAYER if name != "topk"]
ROUTED = [f"routesae {name}" for name in SINGLES]
EVERY = [*NAMES, *SINGLES, *ROUTED, "crosscoder", "mlsae", "random", "top2"]


def recipe_of(name: str) -> Recipe:
    """name: a variant; or hard, soft, top2 for a routesae of topk; or "routesae gated"."""
    parts: dict[str, Any] = {"width": D, "latents": LATENTS, "k": K, "layers": (4, 6, 9), "sae": name}
    if name in SINGLE_LAYER:
        parts["layers"] = (12,)
    elif name in ("hard", "soft"):
        parts |= {"sae": "routesae", "routing": name, "aggregate": "mean"}
    elif name == "top2":
        parts |= {"sae": "routesae", "router": "top2", "balance": 0.5}
    elif name.startswith("routesae"):
        parts |= {"sae": "routesae", "routed": name.split()[1]}
    if "matryoshka" in name:
        parts["prefixes"] = (6, LATENTS)
    return Recipe(**parts)


def make(name: str) -> SAE:
    """An SAE with random weights everywhere, as a trained one has; it has seen a batch, and is in use."""
    generator = torch.Generator().manual_seed(0)
    sae = build(recipe_of(name))
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if "threshold" in key:
                parameter.abs_()
        sae(Normalised(hidden(sae)))
    return sae.eval()


def hidden(sae: SAE) -> Tensor:
    shape = (len(sae.recipe.layers), N, D)
    raw_LND = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5 + 2).half()
    return normalise_layers(raw_LND, "token")


def saved(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    save_sae(folder, make(name), SOURCE)
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    edit(config)
    (folder / "cfg.json").write_text(json.dumps(config))


def without_hashes(folder: Path) -> Path:
    """As a folder of an earlier version, which says nothing of its files' hashes."""

    def drop(config: dict[str, Any]) -> None:
        for name in ("hash", "files"):
            del config["metadata"]["routesae"][name]

    edit_config(folder, drop)
    return folder


def edit_recipe(folder: Path, **changes: Any) -> None:
    edit_config(folder, lambda config: config["metadata"]["routesae"]["recipe"].update(changes))


# ----------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    sae = make(name)
    back = load_sae(saved(tmp_path, name), CPU)
    assert type(back) is type(sae)
    assert back.recipe == sae.recipe
    only_training_needs = ("steered", "batches")
    kept = {key: value for key, value in sae.state_dict().items() if not key.endswith(only_training_needs)}
    loaded = {key: value for key, value in back.state_dict().items() if not key.endswith(only_training_needs)}
    assert {key: value.tolist() for key, value in loaded.items()} == {
        key: value.tolist() for key, value in kept.items()
    }
    assert all(torch.isfinite(buffer).all() for buffer in back.buffers())
    with torch.no_grad():
        was, now = sae(Normalised(hidden(sae))), back(Normalised(hidden(sae)))
    assert (was.latents.dense() > 0).any()
    assert torch.equal(was.reconstruction_ND, now.reconstruction_ND)
    assert torch.equal(was.latents.dense(), now.latents.dense())
    if was.routing_NL is not None:
        assert now.routing_NL is not None
        assert torch.equal(was.routing_NL, now.routing_NL)


def test_every_variant_there_is_has_been_saved_and_loaded() -> None:
    assert {recipe_of(name).sae for name in EVERY} == set(SAES)
    assert {recipe_of(name).routed for name in EVERY} == set(SINGLE_LAYER)


def test_a_loaded_sae_is_ready_to_be_used_not_trained(tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path, "hard"), CPU)
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert all(parameter.device == CPU and parameter.is_contiguous() for parameter in sae.parameters())
    assert not sae.training


# ------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_have_the_names_shapes_and_type_of_saelens(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    weights = load_file(folder / "sae_weights.safetensors")
    shapes = {key: array.shape for key, array in weights.items()}
    assert shapes == {"W_enc": (D, LATENTS), "W_dec": (LATENTS, D), "b_enc": (LATENTS,), "b_dec": (D,)}
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    files = {"sae_weights.safetensors", "cfg.json"} | ({"router.safetensors"} if name != "topk" else set())
    assert {path.name for path in folder.iterdir()} == files
    if name != "topk":
        assert {key: array.shape for key, array in load_file(folder / "router.safetensors").items()} == {
            "router": (L, D)
        }


def test_the_further_weights_of_each_variant_are_those_of_saelens(tmp_path: Path) -> None:
    plain = {"W_enc": (D, LATENTS), "W_dec": (LATENTS, D), "b_dec": (D,)}
    further = {
        "vanilla": ("standard", ["b_enc"]),
        "gated": ("gated", ["b_gate", "b_mag", "r_mag"]),
        "topk": ("topk", ["b_enc"]),
        "hierarchical": ("topk", ["b_enc"]),
        "jumprelu": ("jumprelu", ["b_enc", "threshold"]),
        "batchtopk": ("jumprelu", ["b_enc", "threshold"]),
        "matryoshka": ("jumprelu", ["b_enc", "threshold"]),
    }
    assert set(further) == set(SINGLE_LAYER)
    for name, (architecture, own) in further.items():
        for folder in (saved(tmp_path, name), saved(tmp_path, f"routesae {name}")):
            weights = load_file(folder / "sae_weights.safetensors")
            assert {key: array.shape for key, array in weights.items()} == plain | dict.fromkeys(own, (LATENTS,))
            assert json.loads((folder / "cfg.json").read_text())["architecture"] == architecture


def test_a_crosscoders_weights_lie_layer_by_layer_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder, sae = saved(tmp_path, "crosscoder"), make("crosscoder")
    assert {path.name for path in folder.iterdir()} == {"crosscoder.safetensors", "cfg.json"}
    weights = load_file(folder / "crosscoder.safetensors")
    shapes = {"W_enc": (L, D, LATENTS), "W_dec": (LATENTS, L, D), "b_enc": (LATENTS,), "b_dec": (L, D)}
    assert {key: array.shape for key, array in weights.items()} == shapes
    x_LND = hidden(sae).numpy()
    f_NF = np.maximum(np.einsum("lnd,ldf->nf", x_LND, weights["W_enc"]) + weights["b_enc"], 0)
    expected_NLD = np.einsum("nf,fld->nld", f_NF, weights["W_dec"]) + weights["b_dec"]
    with torch.no_grad():
        found_NLD = load_sae(folder, CPU)(Normalised(hidden(sae))).reconstruction_ND.view(N, L, D).numpy()
    np.testing.assert_allclose(found_NLD, expected_NLD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_cfg_json_says_what_saelens_v6_needs(tmp_path: Path, name: str) -> None:
    config = json.loads((saved(tmp_path, name) / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": LATENTS,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm",
        "rescale_acts_by_decoder_norm": False,
        "reshape_activations": "none",
    }
    assert metadata["sae_lens_version"].startswith("6.")
    assert metadata["model_name"] == "some/model"
    assert metadata["dataset_path"] == "some.jsonl"
    assert metadata["context_size"] == 16
    # Layer 12 is the output of the 12th block, which TransformerLens counts from 0.
    assert metadata["hook_name"] == ("blocks.11.hook_resid_post" if name == "topk" else None)


def test_cfg_json_keeps_the_recipe_and_where_the_sae_came_from(tmp_path: Path) -> None:
    ours = read_config(saved(tmp_path, "soft"))["metadata"]["routesae"]
    assert ours["source"] == SOURCE
    assert ours["recipe"] == {
        "sae": "routesae",
        "layers": [4, 6, 9],
        "width": D,
        "latents": LATENTS,
        "k": K,
        "sparsity": None,
        "pre_act_loss": 0.0,
        "prefixes": [],
        "normalize": "token",
        "routing": "soft",
        "aggregate": "mean",
        "routed": "topk",
        "router": "published",
        "balance": 0.0,
        "freeze": "none",
        "published": False,
    }


@pytest.mark.parametrize("name", NAMES)
def test_numpy_reproduces_the_sae_from_its_files_alone(tmp_path: Path, name: str) -> None:
    folder, sae = saved(tmp_path, name), make(name)
    config = json.loads((folder / "cfg.json").read_text())
    weights = {key: array.astype(np.float64) for key, array in load_file(folder / "sae_weights.safetensors").items()}
    normalised_LND = hidden(sae).numpy().astype(np.float64)
    x_ND = normalised_LND[0]
    if name != "topk":
        scores_NL = normalised_LND.mean(0) @ load_file(folder / "router.safetensors")["router"].T
        w_NL = np.exp(scores_NL) / np.exp(scores_NL).sum(1, keepdims=True)
        if name == "hard":
            best_N = w_NL.argmax(1)
            x_ND = normalised_LND[best_N, np.arange(N)] * w_NL.max(1)[:, None]
        else:
            x_ND = np.einsum("nl,lnd->nd", w_NL, normalised_LND)
    z_NF = (x_ND - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    threshold_N = np.sort(z_NF, axis=1)[:, -config["k"]]
    f_NF = np.where(z_NF >= threshold_N[:, None], np.maximum(z_NF, 0), 0)
    with torch.no_grad():
        out = load_sae(folder, CPU)(Normalised(hidden(sae)))
    found_NF = out.latents.dense().numpy()
    np.testing.assert_allclose(found_NF, f_NF, rtol=1e-4, atol=1e-4)
    expected_ND = f_NF @ weights["W_dec"] + weights["b_dec"]
    np.testing.assert_allclose(out.reconstruction_ND.numpy(), expected_ND, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- wrong folders


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "router.safetensors", "cfg.json"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = saved(tmp_path, "hard")
    (folder / file).unlink()
    with pytest.raises(WrongInput, match=rf"{file}.* (is missing|does not exist)"):
        load_sae(folder, CPU)


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "router.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, file: str, keep: float) -> None:
    folder = saved(tmp_path, "hard")
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(WrongInput, match=rf"{file} cannot be read"):
        load_sae(folder, CPU)


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "router.safetensors"])
def test_weights_under_other_names_are_refused(tmp_path: Path, file: str) -> None:
    folder = without_hashes(saved(tmp_path, "hard"))
    save_file({"b_dec": np.zeros(D, np.float32)}, folder / file)
    with pytest.raises(WrongInput, match=rf"{file} holds no (W_dec, W_enc, b_enc|router);"):
        load_sae(folder, CPU)


@pytest.mark.parametrize(
    "weights",
    [
        {"W_enc": (D, LATENTS + 1)},
        {"W_enc": (LATENTS, D)},
        {"W_dec": (LATENTS, D + 1)},
        {"b_enc": (1,)},
        {"b_dec": (D, 1)},
        {"W_enc": (2, D, LATENTS)},
    ],
)
def test_weights_of_other_shapes_are_refused(tmp_path: Path, weights: dict[str, tuple[int, ...]]) -> None:
    folder = without_hashes(saved(tmp_path, "topk"))
    changed = {key: np.zeros(shape, np.float32) for key, shape in weights.items()}
    save_file({**load_file(folder / "sae_weights.safetensors"), **changed}, folder / "sae_weights.safetensors")
    with pytest.raises(WrongInput, match=rf"{folder}.*where cfg.json says"):
        load_sae(folder, CPU)


def test_a_router_for_other_layers_is_refused(tmp_path: Path) -> None:
    folder = without_hashes(saved(tmp_path, "hard"))
    save_file({"router": np.zeros((L + 1, D), np.float32)}, folder / "router.safetensors")
    with pytest.raises(WrongInput, match=rf"{folder}.*router.*\[4, 8\] where cfg.json says \[3, 8\]"):
        load_sae(folder, CPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '"text"', "{}", '{"metadata": null}'])
def test_a_cfg_json_that_is_not_ours_is_named(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path, "topk")
    (folder / "cfg.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WrongInput, match=r"cfg\.json"):
        load_sae(folder, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1}, "unknown setting 'temperature'"),
        ({"sae": "transcoder"}, "'transcoder' is none of vanilla, gated, topk"),
        ({"sae": "routesae", "routed": "mlsae"}, "'mlsae' is none of vanilla, gated, topk"),
        ({"router": "best"}, "'best'"),
        ({"sparsity": "much"}, "sparsity 'much'"),
        ({"normalize": "batch"}, "'batch'"),
        ({"prefixes": [8, 4]}, "prefixes"),
        ({"sae": ["topk"]}, "sae|SAE"),
        ({"k": LATENTS + 1}, "25.*24 latents"),
        ({"k": 0}, "k 0"),
        ({"k": "four"}, "k 'four'"),
        ({"latents": 24.0}, "latents 24.0"),
        ({"routing": "firm"}, "'firm'"),
        ({"layers": []}, "layers"),
        ({"layers": [12, 13]}, "layers"),
        ({"layers": ["x"]}, "layers 'x'"),
        ({"layers": {"a": 12}}, "layers"),
        ({"sparsity": [0.1]}, "sparsity"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_built_is_refused_and_its_file_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = without_hashes(saved(tmp_path, "topk"))
    edit_recipe(folder, **changes)
    with pytest.raises(WrongInput, match=rf"{folder / 'cfg.json'}.*({message})"):
        load_sae(folder, CPU)


def test_a_recipe_without_a_field_is_refused(tmp_path: Path) -> None:
    folder = without_hashes(saved(tmp_path, "topk"))
    edit_config(folder, lambda config: config["metadata"]["routesae"]["recipe"].pop("k"))
    with pytest.raises(WrongInput, match=r"cfg\.json: --k is missing"):
        read_recipe(folder)


def test_a_recipe_without_what_has_a_default_is_read(tmp_path: Path) -> None:
    folder = without_hashes(saved(tmp_path, "topk"))
    needed = ("sae", "layers", "width", "latents", "k")

    def edit(config: dict[str, Any]) -> None:
        recipe = config["metadata"]["routesae"]["recipe"]
        config["metadata"]["routesae"]["recipe"] = {name: recipe[name] for name in needed}

    edit_config(folder, edit)
    assert read_recipe(folder) == recipe_of("topk")


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "router.safetensors", "crosscoder.safetensors"])
def test_a_pickle_in_place_of_safetensors_is_refused_unopened(tmp_path: Path, file: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = saved(tmp_path, "crosscoder" if "crosscoder" in file else "hard")
    torch.save({"W_enc": Trap()}, folder / file)
    with pytest.raises(WrongInput, match=rf"{file} cannot be read"):
        load_sae(folder, CPU)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["topk", "hard", "gated", "jumprelu", "batchtopk", "crosscoder"])
@pytest.mark.parametrize("size", [10**9, 10**12, 10**17, 10**30])
def test_sizes_that_a_cfg_json_makes_up_are_refused_without_being_allocated(
    tmp_path: Path, name: str, size: int
) -> None:
    folder = without_hashes(saved(tmp_path, name))
    edit_recipe(folder, latents=size, width=1000)  # 10⁹ latents would be 4 TB a weight
    edit_config(folder, lambda config: config.update(d_in=1000, d_sae=size))
    with pytest.raises(WrongInput, match=str(folder)):
        load_sae(folder, CPU)


# ------------------------------------------------------------------------------------- what was saved is what is read


def loaded_or_refused(folder: Path) -> SAE | None:
    try:
        return load_sae(folder, CPU)
    except WrongInput:
        return None


@pytest.mark.parametrize("name", ["topk", "hard", "crosscoder", "batchtopk"])
def test_no_flipped_bit_of_any_file_goes_unnoticed(tmp_path: Path, name: str) -> None:
    """Or it changes nothing that is read: the name of a field that says nothing of the SAE, or white space."""
    folder = saved(tmp_path, name)
    whole = load_sae(folder, CPU)
    rng, unnoticed, flips = random.Random(0), 0, 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in rng.sample(range(len(data)), 60):
            flipped = bytearray(data)
            flipped[at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            flips += 1
            back = loaded_or_refused(folder)
            if back is None:
                continue
            unnoticed += path.suffix != ".json"
            assert back.recipe == whole.recipe
            assert all(torch.equal(now, was) for now, was in zip(back.parameters(), whole.parameters(), strict=True))
        path.write_bytes(data)
    assert (unnoticed, flips) == (0, 60 * len(list(folder.iterdir())))


@pytest.mark.parametrize(
    "changes",
    [{"k": 3}, {"layers": [5, 6, 9]}, {"normalize": "none"}, {"aggregate": "sum"}, {"routing": "soft"}],
    ids=str,
)
def test_a_recipe_changed_by_hand_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = saved(tmp_path, "hard")
    edit_recipe(folder, **changes)
    for read in (read_recipe, read_config, lambda folder: load_sae(folder, CPU)):
        with pytest.raises(WrongInput, match=rf"{folder / 'cfg.json'} is not what was saved; copy the SAE again"):
            read(folder)


@pytest.mark.parametrize("changes", [{"k": 3}, {"normalize_activations": "none"}, {"d_sae": 25}], ids=str)
def test_what_saelens_reads_changed_by_hand_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    for folder in (saved(tmp_path, "topk"), without_hashes(saved(tmp_path, "hard"))):
        edit_config(folder, lambda config: config.update(changes))
        with pytest.raises(WrongInput, match=rf"cfg\.json: {next(iter(changes))} .* is not what was saved"):
            load_sae(folder, CPU)


def test_what_an_sae_is_said_to_be_trained_from_is_known_to_be_what_was_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, "topk")
    edit_config(folder, lambda config: config["metadata"]["routesae"]["source"]["held_out"].update(norm_mse=0.125))
    with pytest.raises(WrongInput, match=r"cfg\.json is not what was saved"):
        read_config(folder)


def test_the_weights_of_another_sae_are_refused(tmp_path: Path) -> None:
    """Of the same shapes: nothing but the hash tells them apart."""
    folder, other = saved(tmp_path, "hard"), saved(tmp_path, "soft")
    save_file({"router": np.zeros((L, D), np.float32)}, folder / "router.safetensors")
    with pytest.raises(WrongInput, match=rf"{folder}: router.safetensors is not what was saved"):
        load_sae(folder, CPU)
    load_sae(other, CPU)


def test_numbers_that_json_cannot_hold_are_saved_and_read_again(tmp_path: Path) -> None:
    sae = make("topk")
    save_sae(tmp_path, sae, {"held_out": {"fvu": float("nan"), "layer_shares": {10: 0.5, 9: 0.5}, "at": (1, 2)}})
    source = read_config(tmp_path)["metadata"]["routesae"]["source"]
    assert source["held_out"] == {"fvu": None, "layer_shares": {"10": 0.5, "9": 0.5}, "at": [1, 2]}


def test_an_sae_is_signed_with_the_bytes_it_was_read_from(tmp_path: Path) -> None:
    """Not with those that are in its folder when a result is written."""
    folder = saved(tmp_path, "hard")
    sae = load_sae(folder, CPU)
    before = {name: xxhash.xxh3_128((folder / name).read_bytes()).hexdigest() for name in sae.files()}
    save_file({"router": np.zeros((L, D), np.float32)}, folder / "router.safetensors")
    assert sae.hashes == before
    assert sae_identity(sae) == {"recipe": sae.recipe.to_dict(), "weights": before}


def test_thresholds_that_differ_are_not_taken_for_one(tmp_path: Path) -> None:
    folder = without_hashes(saved(tmp_path, "batchtopk"))
    weights = load_file(folder / "sae_weights.safetensors")
    weights["threshold"][3] += 1
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(WrongInput, match="thresholds that differ"):
        load_sae(folder, CPU)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "router.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, file: str) -> None:
    folder = saved(tmp_path, "hard")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(WrongInput, match=rf"{file} cannot be read.*not a regular file"):
        load_sae(folder, CPU)


def test_all_files_of_an_sae_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, "hard")
    (folder / "other").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


# ------------------------------------------------------------------------------------------------- find_saes


def test_find_saes_lists_sae_folders_by_name_and_no_hidden_or_other_ones(tmp_path: Path) -> None:
    for name in ("b", "a", ".a.partial", "empty", "a/nested"):
        (tmp_path / name).mkdir()
    for name in ("b", "a", ".a.partial", "a/nested"):
        (tmp_path / name / "cfg.json").write_text("{}")
    assert find_saes(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_no_sae_anywhere_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "cfg.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(WrongInput, match=f"no SAE under {folder}; train one"):
            find_saes(folder)


# ------------------------------------------------------------------------------------- folders of earlier versions

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*/")))
def test_folders_written_by_the_code_of_an_earlier_version_give_the_numbers_they_gave(name: str) -> None:
    """Written at commit 3d371df, with what they gave there: routesae hard and soft, mlsae and crosscoder too."""
    expected = {
        key.partition(".")[2]: torch.from_numpy(x) for key, x in EXPECTED.items() if key.startswith(f"{name}.")
    }
    sae = load_sae(GOLDEN / name, CPU)
    hidden_LND = torch.from_numpy(EXPECTED["hidden_LND"])[[(2, 3).index(layer) for layer in sae.recipe.layers]]
    hidden = hidden_LND[0] if sae.one_layer else hidden_LND.transpose(0, 1)
    latents = sae.encode(hidden)
    rows_RF = latents.pairs.dense(latents.values_P)  # an mlsae's layer after layer, as they were stored
    torch.testing.assert_close(rows_RF, expected["latents_NF"])
    if name == "soft":
        torch.testing.assert_close(sae(hidden).x_ND, expected["x_ND"])
        torch.testing.assert_close(sae(hidden).reconstruction_ND, expected["normalised_reconstruction_ND"])
    else:
        in_expected_order = (
            sae.decode(latents).movedim(-2, 0) if name in ("crosscoder", "mlsae") else sae.decode(latents)
        )
        torch.testing.assert_close(in_expected_order, expected["reconstruction"])


EXPECTED = load_file(GOLDEN / "expected.safetensors")
