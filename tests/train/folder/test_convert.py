"""Checkpoints of the published RouteSAE code become SAE folders that compute what the code computed."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from routesae.cli import main
from routesae.machine.lock import hold
from routesae.reporting import WrongInput
from routesae.tests.hidden import Normalised
from routesae.train.folder.checkpoint import load_sae, read_config
from routesae.train.folder.convert import convert, read_title
from routesae.train.saes import SAE, RouteSAE, SingleLayerSAE
from routesae.train.settings import ConvertSettings

CPU = torch.device("cpu")
D, F, K, N, LAYERS = 16, 40, 5, 60, 5  # five layers: an LM of eight blocks, layers 2 to 6


# ------------------------------------------------------- the published equations, with the published parameter names


class Dictionary(nn.Module):
    """x̂ = W_dec f + pre_bias, f from W_enc (x − pre_bias): how, a subclass says in `latents`."""

    vectors: tuple[str, ...] = ("latent_bias",)

    def __init__(self) -> None:
        super().__init__()
        for name in self.vectors:
            self.register_parameter(name, nn.Parameter(torch.randn(F) * 0.3))
        self.pre_bias = nn.Parameter(torch.randn(D) * 0.3)
        self.encoder, self.decoder = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)
        # As published: encoderᵀ, a clone that keeps the strides of the transposed view.
        self.decoder.weight.data = self.encoder.weight.data.T.clone()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.latents(self.encoder(x - self.pre_bias))
        return f, self.decoder(f) + self.pre_bias

    def latents(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Vanilla(Dictionary):
    def latents(self, z: Tensor) -> Tensor:
        return torch.relu(z + self.latent_bias)


class TopK(Dictionary):
    def latents(self, z: Tensor) -> Tensor:
        top = (z + self.latent_bias).topk(K, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values)


class JumpReLU(Dictionary):
    vectors = ("latent_bias", "threshold")

    def __init__(self) -> None:
        super().__init__()
        self.threshold.data.abs_()

    def latents(self, z: Tensor) -> Tensor:
        z = z + self.latent_bias
        return z * (z > self.threshold)


class Gated(Dictionary):
    vectors = ("gate_bias", "mag_bias", "r_mag")

    def latents(self, z: Tensor) -> Tensor:
        return (z + self.gate_bias > 0) * torch.relu(self.r_mag.exp() * z + self.mag_bias)


class Routed(nn.Module):
    def __init__(self, aggregate: str = "sum", routing: str = "hard", layers: int = LAYERS) -> None:
        super().__init__()
        self.router, self.sae = nn.Linear(D, layers, bias=False), TopK()
        self.aggregate, self.routing = aggregate, routing

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(index of the layer, x, f, x̂)."""
        gathered = x_NLD.sum(1) if self.aggregate == "sum" else x_NLD.mean(1)
        w_NL = self.router(gathered).softmax(-1)
        if self.routing == "soft":
            x = (x_NLD * w_NL[:, :, None]).sum(1)
        else:
            x = x_NLD[torch.arange(len(x_NLD)), w_NL.argmax(1)] * w_NL.amax(1, keepdim=True)
        return (w_NL.argmax(1), x, *self.sae(x))


class Crosscoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latent_bias = nn.Parameter(torch.randn(F) * 0.3)
        self.encoder = nn.ModuleList(nn.Linear(D, F, bias=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(nn.Linear(F, D, bias=False) for _ in range(LAYERS))

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor]:
        f = torch.relu(sum(encode(x_NLD[:, at]) for at, encode in enumerate(self.encoder)) + self.latent_bias)
        return f, torch.stack([decode(f) for decode in self.decoder], dim=1)


SINGLE: dict[str, tuple[type[Dictionary], str]] = {
    "vanilla": (Vanilla, "L12_VL0.01_1B_data_40.pt"),
    "gated": (Gated, "L12_GL1e-05_1B_data_40.pt"),
    "topk": (TopK, f"L12_K{K}_1B_data_40.pt"),
    "jumprelu": (JumpReLU, "L12_JL0.001_1B_data_40.pt"),
}


def inputs(layers: int = LAYERS) -> Tensor:
    """x_NLD: hidden states of zero mean and unit std a token and layer."""
    x_NLD = torch.randn(N, layers, D, generator=torch.Generator().manual_seed(7)) * 3 + 1
    return (x_NLD - x_NLD.mean(2, keepdim=True)) / (x_NLD.std(2, keepdim=True) + 1e-6)


def saved(module: nn.Module, file: Path) -> Path:
    torch.save(module.state_dict(), file)
    return file


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(3)
    return make().requires_grad_(False)


def converted(file: Path, **options: Any) -> SAE:
    """What convert wrote, loaded back from its folder."""
    done = convert(ConvertSettings(file=str(file), out=str(file.parent / "saes"), **options))
    sae = load_sae(done.folder, CPU)
    assert sae.recipe == done.recipe
    return sae


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", SINGLE)
def test_latents_and_reconstruction_are_the_published_ones(name: str, tmp_path: Path) -> None:
    module, title = SINGLE[name]
    theirs = seeded(module)
    sae = converted(saved(theirs, tmp_path / title))
    assert (sae.recipe.sae, sae.recipe.layers, sae.recipe.published) == (name, (12,), True)
    f_NF, reconstruction_ND = theirs(inputs(1)[:, 0])
    assert (f_NF > 0).any()
    assert (f_NF >= 0).all()  # or a topk here differs, which has no negative latents
    out = sae(Normalised(inputs(1).transpose(0, 1)))
    close(out.latents.dense(), f_NF)
    close(out.reconstruction_ND, reconstruction_ND)
    assert isinstance(sae, SingleLayerSAE)
    close(sae.decode(sae.encode(inputs(1)[:, 0])), reconstruction_ND)


@pytest.mark.parametrize("routing", ["hard", "soft"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_routes_scaled_input_and_reconstruction_of_a_routesae_are_the_published_ones(
    aggregate: str, routing: str, tmp_path: Path
) -> None:
    theirs = seeded(lambda: Routed(aggregate, routing))
    sae = converted(saved(theirs, tmp_path / f"{aggregate}_{routing}_K{K}_1B_data_40.pt"))
    assert isinstance(sae, RouteSAE)
    assert (sae.recipe.layers, sae.recipe.aggregate, sae.recipe.routing) == ((2, 3, 4, 5, 6), aggregate, routing)
    at_N, x_ND, f_NF, reconstruction_ND = theirs(inputs())
    assert set(at_N.tolist()) == set(range(LAYERS))  # or the routes prove nothing
    out = sae(Normalised(inputs().transpose(0, 1)))
    assert torch.equal(sae.routes(Normalised(inputs().transpose(0, 1))).at_R, at_N)
    close(out.x_ND, x_ND)
    close(out.latents.dense(), f_NF)
    close(out.reconstruction_ND, reconstruction_ND)


def test_a_crosscoder_is_the_published_one_at_every_layer(tmp_path: Path) -> None:
    theirs = seeded(Crosscoder)
    sae = converted(saved(theirs, tmp_path / "Cross_CL0.01_1B_data_40.pt"))
    assert (sae.recipe.sae, sae.recipe.layers, sae.recipe.sparsity) == ("crosscoder", (2, 3, 4, 5, 6), 0.0)
    f_NF, reconstruction_NLD = theirs(inputs())
    out = sae(Normalised(inputs().transpose(0, 1)))
    close(out.latents.dense(), f_NF)
    close(out.reconstruction_ND.view(N, LAYERS, D), reconstruction_NLD)


@pytest.mark.parametrize(
    ("title", "name"), [(f"ML_K{K}_1B_data_40.pt", "mlsae"), (f"RDM_K{K}_1B_data_40.pt", "random")]
)
def test_mlsae_and_random_are_the_published_topk_on_every_layer(title: str, name: str, tmp_path: Path) -> None:
    theirs = seeded(TopK)
    sae = converted(saved(theirs, tmp_path / title), layers="3-5")
    assert (sae.recipe.sae, sae.recipe.layers, sae.recipe.k) == (name, (3, 4, 5), K)
    x_NLD = inputs(3)
    _, reconstruction_NLD = theirs(x_NLD)
    close(sae(Normalised(x_NLD.transpose(0, 1))).reconstruction_ND.view(3, N, D), reconstruction_NLD.transpose(0, 1))


def test_a_checkpoint_of_raw_inputs_is_converted_with_normalize_none(tmp_path: Path) -> None:
    """Its keys are those of one trained on normalised inputs, so the option says it."""
    theirs = seeded(TopK)
    raw_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(7)) * 3 + 1
    f_NF, reconstruction_ND = theirs(raw_ND)
    file = saved(theirs, tmp_path / SINGLE["topk"][1])
    sae = converted(file, normalize="none")
    close(sae.encode(raw_ND).dense(), f_NF.relu())
    close(sae.decode(sae.encode(raw_ND)), reconstruction_ND)
    assert (converted(file, name="other").encode(raw_ND).dense() - f_NF).abs().max() > 0.1


def test_negative_thresholds_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = seeded(JumpReLU)
    theirs.threshold[:3] = -0.5
    converted(saved(theirs, tmp_path / SINGLE["jumprelu"][1]))
    assert f"3 of {F} thresholds are below 0" in caplog.text


# ------------------------------------------------------------------------------------- what the tensors do not say


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("L12_K64_1B_data_16384", {"sae": "topk", "layer": 12, "k": 64}),
        ("L12_VL0.01_1B_data_16384", {"sae": "vanilla", "layer": 12}),
        ("L3_GL1e-05_1B_d", {"sae": "gated", "layer": 3}),
        ("L3_JL0.001_1B_d", {"sae": "jumprelu", "layer": 3}),
        ("sum_hard_K64_1B_d", {"sae": "routesae", "aggregate": "sum", "routing": "hard", "k": 64}),
        ("mean_soft_K8_1B_d", {"sae": "routesae", "aggregate": "mean", "routing": "soft", "k": 8}),
        ("Cross_CL0.01_1B_d", {"sae": "crosscoder"}),
        ("ML_K64_1B_d", {"sae": "mlsae", "k": 64}),
        ("RDM_K64_1B_d", {"sae": "random", "k": 64}),
        ("model", {}),
        ("Llama_K64", {}),
    ],
)
def test_published_file_names_are_read(stem: str, expected: dict[str, Any]) -> None:
    assert read_title(stem) == expected


def test_options_win_over_the_file_name(tmp_path: Path) -> None:
    file = saved(seeded(TopK), tmp_path / f"L12_K{K}_1B_data_40.pt")
    recipe = converted(file, k=3, layer=7).recipe
    assert (recipe.k, recipe.layers) == (3, (7,))
    assert converted(file, sae="vanilla", name="v").recipe.sae == "vanilla"


def test_layers_that_are_guessed_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(seeded(Routed), tmp_path / "model.pt")
    recipe = converted(file, k=K).recipe
    assert recipe.layers == (2, 3, 4, 5, 6)
    assert "layers 2-6" in caplog.text
    assert "of 8 blocks" in caplog.text
    assert "its routing: taken to be hard" in caplog.text
    assert "its aggregate: taken to be sum" in caplog.text
    caplog.clear()
    told = converted(file, k=K, layers="4-8", routing="soft", aggregate="mean", name="told").recipe
    assert (told.layers, told.routing, told.aggregate) == ((4, 5, 6, 7, 8), "soft", "mean")
    assert caplog.text == ""


def test_sixteen_blocks_are_layers_4_to_12(tmp_path: Path) -> None:
    file = saved(seeded(lambda: Routed(layers=9)), tmp_path / f"sum_hard_K{K}_1B_data_40.pt")
    assert converted(file).recipe.layers == tuple(range(4, 13))


def test_cfg_json_says_what_it_was_converted_from(tmp_path: Path) -> None:
    file = saved(seeded(TopK), tmp_path / f"L12_K{K}_1B_data_40.pt")
    folder = convert(ConvertSettings(file=str(file), model="some/model", out=str(tmp_path), name="mine")).folder
    assert folder == tmp_path / "mine"
    source = read_config(folder)["metadata"]["routesae"]["source"]
    assert source["model"] == "some/model"
    assert source["converted"] == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


# ------------------------------------------------------------------------------------------------- wrong input


def refused(file: Path, **options: Any) -> str:
    with pytest.raises(WrongInput) as error:
        convert(ConvertSettings(file=str(file), out=str(file.parent / "saes"), **options))
    assert "\n" not in str(error.value)
    assert not (file.parent / "saes").exists()
    return str(error.value)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("container", ["torch", "legacy", "bare pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(container: str, tmp_path: Path) -> None:
    file, marker = tmp_path / f"L12_K{K}_1B.pt", tmp_path / "marker"
    state = {"encoder.weight": Hostile(marker)}
    if container == "bare pickle":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=container == "torch")
    assert "not a state dict of tensors" in refused(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))  # the bait works where it is taken
    assert marker.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "folder", "other zip"])
def test_files_that_are_no_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    if kind == "folder":
        file.mkdir()
    elif kind == "other zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind == "cut":
        data = saved(seeded(TopK), file).read_bytes()
        file.write_bytes(data[: len(data) // 2])
    elif kind != "missing":
        file.write_text("hello" * (kind == "text"))
    assert str(file) in refused(file, sae="topk", layer=3, k=4)


def state_of(**changes: Any) -> dict[str, Any]:
    """A topk's state dict with entries replaced; None takes one out."""
    state = {**seeded(TopK).state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ([torch.zeros(3)], "holds other things than tensors"),
        ({"model": {"encoder.weight": torch.zeros(3)}, "epoch": 3}, "holds other things than tensors"),
        ({}, "no SAE of the published RouteSAE code has these keys"),
        (torch.zeros(3), "holds other things than tensors"),
        ({"fc.weight": torch.zeros(3, 3)}, "no SAE of the published RouteSAE code has these keys (fc.weight)"),
        (state_of(pre_bias=None), "no SAE of the published RouteSAE code has these keys"),
        (state_of(extra=torch.zeros(3)), "no SAE of the published RouteSAE code has these keys"),
        (state_of(latent_bias=torch.zeros(F + 1)), f"latent_bias is [{F + 1}]"),
        (state_of(decoder__weight=torch.zeros(F, D)), f"decoder.weight is [{F}, {D}]"),
        (state_of(encoder__weight=torch.zeros(F)), "encoder.weight is"),
        (state_of(pre_bias=torch.full((D,), torch.nan)), "pre_bias holds NaN"),
        (state_of(pre_bias=torch.zeros(D, dtype=torch.int64)), "not an ordinary tensor of floats"),
        (state_of(pre_bias=torch.zeros(()).expand(10**12)), "not an ordinary tensor of floats"),
        (
            {
                "latent_bias": torch.zeros(F),
                "encoder.0.weight": torch.zeros(F, D),
                "decoder.1.weight": torch.zeros(D, F),
            },
            "no SAE of the published RouteSAE code has these keys",
        ),
    ],
)
def test_state_dicts_that_are_no_such_saes_are_refused(state: Any, expected: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"L3_K{K}_x.pt")
    assert expected in refused(tmp_path / f"L3_K{K}_x.pt")


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (TopK, {"layer": 3, "k": 4}, "may be vanilla or topk or mlsae or random, which have the same keys"),
        (TopK, {"sae": "gated", "layer": 3}, "--sae gated: the keys"),
        (TopK, {"sae": "topk", "layer": 3}, "give --k"),
        (TopK, {"sae": "topk", "k": 4}, "give --layer"),
        (TopK, {"sae": "topk", "k": F + 1, "layer": 3}, f"--k {F + 1} is more than"),
        (TopK, {"sae": "topk", "k": 4, "layers": "3-4"}, "reads one layer; give --layer"),
        (TopK, {"sae": "mlsae", "k": 4}, "give --layers"),
        (TopK, {"sae": "topk", "k": 4, "layer": 3, "routing": "hard"}, "only routesae has a router"),
        (Routed, {}, "give --k"),
        (Routed, {"k": 4, "layer": 3}, "reads several layers; give --layers"),
        (Routed, {"k": 4, "layers": "2-5"}, "--layers 2-5 are 4, but it reads 5 layers"),
        (Routed, {"k": 4, "layers": "x"}, "--layers 'x' is not a list"),
        (Routed, {"k": 4, "routing": "soggy"}, "--routing 'soggy' is none of hard, soft"),
        (Crosscoder, {"layers": "2-7"}, "--layers 2-7 are 6, but it reads 5 layers"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    module: Any, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in refused(saved(seeded(module), tmp_path / "model.pt"), **options)


def test_an_sae_of_the_same_name_is_replaced_only_when_told(tmp_path: Path) -> None:
    file = saved(seeded(TopK), tmp_path / f"L12_K{K}_1B_data_40.pt")
    folder = tmp_path / "saes" / file.stem
    converted(file)
    with pytest.raises(WrongInput, match=r"exists; give another --name, or --overwrite"):
        converted(file)
    converted(file, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "interpretations.json").write_text("paid for")
    converted(file, overwrite=True)
    assert (folder.parent / "replaced" / f"{folder.name}-1" / "interpretations.json").read_text() == "paid for"
    (folder / "cfg.json").unlink()
    with pytest.raises(WrongInput, match="is not an SAE, so it is not overwritten"):
        converted(file, overwrite=True)


def test_a_pipe_in_place_of_a_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "L3_K4.pt")
    with pytest.raises(WrongInput, match=r"L3_K4\.pt is not a state dict"):
        convert(ConvertSettings(file=str(tmp_path / "L3_K4.pt"), out=str(tmp_path / "saes")))


def test_an_sae_that_is_trained_now_is_not_converted_over(tmp_path: Path) -> None:
    file = saved(seeded(TopK), tmp_path / f"L12_K{K}_1B_data_40.pt")
    with hold(tmp_path / ".mine.lock", "mine"), pytest.raises(WrongInput, match=r"mine is in use by process"):
        convert(ConvertSettings(file=str(file), out=str(tmp_path), name="mine", overwrite=True))


def test_the_command_says_what_it_wrote_and_exits_2_on_wrong_input(tmp_path: Path) -> None:
    file = saved(seeded(TopK), tmp_path / f"L12_K{K}_1B_data_40.pt")
    done = CliRunner().invoke(main, ["convert", str(file), "--out", str(tmp_path / "saes")])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'saes' / file.stem}: topk of layer 12; {F} latents of width {D}\n"
    wrong = CliRunner().invoke(main, ["convert", str(file), "--sae", "dense"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("routesae: --sae 'dense' is none of vanilla, topk")


@pytest.mark.parametrize(
    ("name", "value"),
    [("sae", "topk"), ("k", 8), ("layers", "3-5"), ("routing", "soft"), ("aggregate", "mean"), ("normalize", "none")],
)
def test_what_a_folder_of_another_tool_says_itself_cannot_be_given(name: str, value: Any) -> None:
    settings = ConvertSettings(file="lens:release/id", **{name: value})
    with pytest.raises(WrongInput, match=rf"^--{name} {value} is for a .pt; lens:release/id says that itself"):
        convert(settings)
