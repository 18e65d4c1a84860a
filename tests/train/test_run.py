"""The stage train, end to end on a tiny cache: it learns, repeats, logs, refuses, and leaves no half-written SAE."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from routesae.harvest.cache.reader import Cache
from routesae.machine.lock import Lock
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput, silent
from routesae.tests.processes import Command
from routesae.train.evaluate import score_on_cache
from routesae.train.folder.checkpoint import find_saes, load_sae, read_config
from routesae.train.jobs import Job
from routesae.train.loading.batches import Batch, Batches, Selection, load
from routesae.train.log import StepLog, read_metrics
from routesae.train.losses import Objective
from routesae.train.optimiser import lr_factor
from routesae.train.run import INITIAL_SAMPLE_TOKENS, TrainResult, fit, planned, train
from routesae.train.saes import PENALISED, SAE, SAES, SINGLE_LAYER, Forward, Recipe, build
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import RunSettings, TrainSettings, reason_against
from routesae.train.sparse import search
from routesae.train.sparse.pairs import Latents
from routesae.train.sparse.policy import arithmetic
from routesae.train.state import newest_step
from routesae.train.trainee import Pace, Trainee

CPU = torch.device("cpu")
EVERY_SAE: list[dict[str, Any]] = [
    {"sae": "topk", "layer": 3},
    {"sae": "routesae"},
    {"sae": "routesae", "routing": "soft"},
]
IDS = ["topk", "hard", "soft"]


Settings = Callable[..., TrainSettings]


def logged(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder)


def metrics(result: TrainResult) -> list[dict[str, Any]]:
    return logged(result.folder)


def training_tokens(cache: Cache) -> int:
    return len(Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers[:1]))


def untrained(trained: SAE) -> SAE:
    """The same recipe and seed, before any step."""
    return build(trained.recipe, torch.Generator().manual_seed(0))


def only(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """The one SAE of a run."""
    (result,) = train(settings, report)
    return result


def fitted(
    sae: SAE, chosen: TrainSettings, selection: Selection, folder: Path, report: Report = silent
) -> list[dict[str, Any]]:
    """The lines that `fit` writes of this very SAE."""
    total_steps, _ = planned(selection, chosen)
    pace = Pace(
        total_steps=total_steps,
        epoch_steps=total_steps,
        dead_after_tokens=chosen.dead_after_tokens,
        sparsity_warmup=chosen.sparsity_warmup,
        arithmetic=arithmetic("cpu"),
        seed=chosen.seed,
    )
    job = Job(chosen.runs[0], sae.recipe, folder, {})
    job.partial.mkdir()
    log = StepLog(sae, job.partial, [], job.lr)
    with closing(log):
        fit([Trainee(sae, job, pace, log)], selection, chosen, 0, report)
    return logged(job.partial)


def visible(folder: Path) -> list[str]:
    """What under `folder` a person or analyze would take for an SAE."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# -------------------------------------------------------------------------------------- learning, repeating


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_training_reconstructs_far_better_than_an_untrained_sae(
    tiny_cache: Cache, settings: Settings, variant: dict[str, Any]
) -> None:
    result = only(settings(**variant, epochs=6, batch_tokens=500, latents=128))
    rows = (tiny_cache.manifest.train_rows, tiny_cache.manifest.rows)
    trained = load_sae(result.folder, CPU)
    before = score_on_cache(untrained(trained), tiny_cache, *rows).norm_mse
    after = score_on_cache(trained, tiny_cache, *rows).norm_mse
    assert after < 0.6 * before
    assert after < 1
    lines = metrics(result)
    assert lines[-1]["norm_mse"] < 0.6 * lines[0]["norm_mse"]


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_two_runs_with_one_seed_give_the_same_bytes_and_another_seed_does_not(
    settings: Settings, variant: dict[str, Any]
) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = only(settings(**variant, name=name, seed=seed)).folder
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == (1 if variant["sae"] == "topk" else 2)
        return b"".join(file.read_bytes() for file in files)

    first = weights("a", 5)
    assert weights("b", 5) == first
    assert weights("c", 6) != first


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_the_seed_sets_the_initial_weights(settings: Settings, variant: dict[str, Any]) -> None:
    # One step of all the tokens at next to no rate: the order of the batches has no part in it.
    def weights(seed: int) -> dict[str, Tensor]:
        chosen = settings(**variant, name=str(seed), seed=seed, lr=1e-12, batch_tokens=50_000)
        return dict(load_sae(only(chosen).folder, CPU).named_parameters())

    first, second = weights(5), weights(6)
    for name in first:
        if "b_" not in name:
            assert (first[name] - second[name]).abs().mean() > 0.05, name


def test_training_starts_with_the_decoder_bias_at_the_median_of_the_training_tokens(
    tiny_cache: Cache, settings: Settings
) -> None:
    folder = only(settings(lr=1e-12, batch_tokens=50_000, layer=4)).folder
    pieces = []
    for shard in tiny_cache.shards():
        row = shard.record.rows[0] + shard.read("order") // tiny_cache.manifest.context
        pieces.append(torch.from_numpy(shard.read("layer_04")[row < tiny_cache.manifest.train_rows]).double())
    h_ND = torch.cat(pieces)
    assert len(h_ND) == training_tokens(tiny_cache) <= INITIAL_SAMPLE_TOKENS  # else only a sample is looked at
    x_ND = (h_ND - h_ND.mean(1, keepdim=True)) / h_ND.std(1, keepdim=True)
    b_dec_D = load_sae(folder, CPU).state_dict()["b_dec_D"].double()
    pulls_ND = (x_ND - b_dec_D) / (x_ND - b_dec_D).norm(dim=1, keepdim=True)
    assert pulls_ND.mean(0).norm() < 1e-3  # where the summed distance is least, the unit pulls cancel
    assert b_dec_D.norm() > 0.01


def test_two_runs_on_two_threads_give_the_same_bytes(settings: Settings, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    first, second = (only(settings(sae="routesae", name=name)).folder for name in ("a", "b"))
    assert (first / "sae_weights.safetensors").read_bytes() == (second / "sae_weights.safetensors").read_bytes()


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_every_weight_moves_and_the_decoder_ends_at_unit_norm(settings: Settings, variant: dict[str, Any]) -> None:
    trained = load_sae(only(settings(**variant)).folder, CPU)
    start = dict(untrained(trained).named_parameters())
    for name, parameter in trained.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    W_dec_FD = dict(trained.named_parameters())["W_dec_FD" if variant["sae"] == "topk" else "shared.W_dec_FD"]
    torch.testing.assert_close(W_dec_FD.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", ["routesae", "published"])
def test_a_frozen_part_keeps_its_random_weights_in_every_variant_and_the_rest_is_trained(
    settings: Settings, recipe: str
) -> None:
    chosen = settings(sae=list(SAES), layer=3, freeze=["encoder", "decoder"], recipe=recipe, sparsity=0.01)
    results = train(chosen)
    assert len(results) == 2 * len(SAES)
    for result in results:
        trained = load_sae(result.folder, CPU)
        part = trained.recipe.freeze
        assert result.folder.name.split("_")[4] == f"frozen-{part}"
        start = dict(untrained(trained).named_parameters())
        kept = {name for name, now in trained.named_parameters() if torch.equal(now, start[name])}
        weights = {f"{'shared.' * (trained.recipe.sae == 'routesae')}W_{of}_FD" for of in ("enc", "dec")}
        assert {name for name in kept if "W_" in name} == {name for name in weights if part[:3] in name}
        assert recipe == "published" or len(kept) == 1, result.folder.name


@pytest.mark.parametrize(
    "given", [{"lr": "auto"}, {"lr": None}, {"lr": "0.024"}, {"lr": "auto", "recipe": "published"}]
)
def test_a_rate_that_is_not_given_is_worked_out_said_and_recorded(
    settings: Settings, caplog: pytest.LogCaptureFixture, given: dict[str, Any]
) -> None:
    with caplog.at_level("INFO"):
        result = only(settings(**given))
    lr = 5e-4 if "recipe" in given else 0.024  # 0.192/√64
    assert f"peak learning rate {lr}" in caplog.messages
    source = read_config(result.folder)["metadata"]["routesae"]["source"]
    assert source["settings"]["run"]["lr"] == source["identity"]["run"]["lr"] == lr
    assert metrics(result)[1]["lr"] == lr


# ------------------------------------------------------------------------------------------------- from an SAE

BEGINNINGS: list[dict[str, Any]] = [
    *({"sae": name} for name in SAES),
    {"sae": "routesae", "routed": "jumprelu", "router": "top2"},
    {"sae": "topk", "normalize": "dataset"},
]


@pytest.mark.parametrize("variant", BEGINNINGS, ids=lambda variant: " ".join(variant.values()))
def test_from_begins_with_the_weights_of_an_sae_and_new_latents_as_usual(
    settings: Settings, variant: dict[str, Any]
) -> None:
    layer = {"layer": 3} if variant["sae"] in SINGLE_LAYER else {}
    source = only(settings(**variant, **layer, latents=24, name="source")).folder
    still = {"lr": 1e-12, "batch_tokens": 50_000, "freeze": "none"}  # one step, in which next to nothing moves
    begun = only(settings(**variant, latents=40, name="begun", warm_start=str(source), **still)).folder
    fresh = only(settings(**variant, **layer, latents=40, name="fresh", **still)).folder
    theirs, ours, usual = (dict(load_sae(folder, CPU).named_parameters()) for folder in (source, begun, fresh))
    for name, parameter in ours.items():
        kept = tuple(map(slice, theirs[name].shape))
        torch.testing.assert_close(
            parameter[kept], theirs[name], rtol=1e-4, atol=1e-5, msg=f"{name}: not the source's"
        )
        if len(parameter) == 40:
            new = usual[name][24:]
            torch.testing.assert_close(parameter[24:], new, rtol=1e-4, atol=1e-5, msg=f"{name}: new latents")
    recorded = read_config(begun)["metadata"]["routesae"]["source"]
    assert recorded["identity"]["run"]["warm_start"] == load_sae(source, CPU).hashes
    assert recorded["settings"]["run"]["warm_start"] == str(source)


def test_from_takes_layer_and_latents_from_the_sae_and_continues_where_it_ended(settings: Settings) -> None:
    first = only(settings(sae="batchtopk", layer=4, latents=48, name="first", epochs=6))
    again = only(settings(sae="batchtopk", latents=None, name="again", epochs=1, warm_start=str(first.folder)))
    recipe = load_sae(again.folder, CPU).recipe
    assert (recipe.layers, recipe.latents) == ((4,), 48)
    assert logged(again.folder)[0]["norm_mse"] < 0.6 * logged(first.folder)[0]["norm_mse"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": "batchtopk"}, "has sae topk, and this run batchtopk; begin from an SAE of the same variant"),
        ({"layer": 4}, r"has layers \(3,\), and this run \(4,\)"),
        ({"normalize": "none"}, "has normalize token, and this run none"),
        ({"latents": 23}, "has 24 latents; give --latents 24 or more"),
    ],
)
def test_from_refuses_an_sae_that_does_not_fit(settings: Settings, changes: dict[str, Any], message: str) -> None:
    source = only(settings(layer=3, latents=24, name="source")).folder
    with pytest.raises(WrongInput, match=message):
        train(settings(**{"layer": 3, "name": "begun", "warm_start": str(source), **changes}))
    with pytest.raises(WrongInput, match="is not an SAE folder"):
        train(settings(name="begun", warm_start=str(source.parent)))
    assert visible(source.parent) == ["source"]


def test_a_run_from_an_sae_resumes_to_the_same_bytes_and_not_from_another_one(settings: Settings) -> None:
    chosen = {"name": "begun", "checkpoint_every_steps": 3}
    folders = [only(settings(latents=24, name=name, seed=seed)).folder for seed, name in enumerate(("a", "b"))]
    whole = only(settings(**chosen, warm_start=str(folders[0]))).folder
    weights = (whole / "sae_weights.safetensors").read_bytes()

    def stop(now: Progress) -> None:
        if now.done >= 6:
            raise Stopped("", 1)

    with pytest.raises(Stopped):
        train(settings(**chosen, warm_start=str(folders[0]), overwrite=True), stop)
    with pytest.raises(WrongInput, match=r"run\.warm_start"):
        train(settings(**chosen, warm_start=str(folders[1]), resume=True))
    resumed = only(settings(**chosen, warm_start=str(folders[0]), resume=True)).folder
    assert (resumed / "sae_weights.safetensors").read_bytes() == weights


# -------------------------------------------------------------------------------------------- what is logged


class Recorded:
    """What every step of a run saw and gave, taken by hooks: latents, loss, dead latents, routing."""

    def __init__(self, sae: SAE, monkeypatch: pytest.MonkeyPatch):
        self.outs: list[Forward] = []
        self.losses: list[float] = []
        self.dead: list[Tensor] = []
        inner = sae.loss

        def loss(out: Forward, dead_d: Tensor, sparsity_factor: float = 1.0) -> Objective:
            given = inner(out, dead_d, sparsity_factor)
            self.outs.append(Forward(*(part if part is None else _detached(part) for part in out)))
            self.losses.append(given.total.item())
            self.dead.append(dead_d.clone())
            return given

        monkeypatch.setattr(sae, "loss", loss)


def _detached(part: Any) -> Any:
    if isinstance(part, Latents):
        return Latents(part.values_P.detach().clone(), part.pairs)
    return part.detach().clone() if isinstance(part, Tensor) else type(part)(*(x.detach().clone() for x in part))


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_the_log_says_of_each_stretch_of_steps_what_the_steps_did(
    tiny_cache: Cache,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: dict[str, Any],
) -> None:
    chosen = settings(**variant, epochs=2, dead_after_tokens=2500, k=2)
    layers = (3,) if variant["sae"] == "topk" else tiny_cache.manifest.layers
    routing = variant.get("routing", "hard")
    recipe = Recipe(sae=variant["sae"], layers=layers, width=32, latents=64, k=2, routing=routing)
    sae = build(recipe, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dict(sae.named_parameters())["b_enc_F" if variant["sae"] == "topk" else "shared.b_enc_F"][:3] = -1e6
    recorded = Recorded(sae, monkeypatch)
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, layers)
    seen: list[Progress] = []
    lines = fitted(sae, chosen, selection, tmp_path / "log", seen.append)

    total_steps = len(recorded.outs)
    assert total_steps == 2 * math.ceil(len(selection) / 1000)
    assert [line["step"] for line in lines] == [*range(3, total_steps, 3), total_steps]
    assert [progress.done for progress in seen] == [line["step"] for line in lines]
    assert {progress.total for progress in seen} == {total_steps}

    idle, tokens, begin = [0] * 64, 0, 0
    some_are_dead = False
    for line in lines:
        outs, losses = recorded.outs[begin : line["step"]], recorded.losses[begin : line["step"]]
        sizes = [len(out.x_ND) for out in outs]
        for at, (out, size) in enumerate(zip(outs, sizes, strict=True)):
            # AuxK works on the latents that were dead before the step.
            assert recorded.dead[begin + at].tolist() == [latent for latent, n in enumerate(idle) if n >= 2500]
            fired = set(out.latents.active()[1].tolist())
            idle = [0 if latent in fired else n + size for latent, n in enumerate(idle)]
        tokens += sum(sizes)
        error = l0 = 0.0
        for out in outs:
            shares_N = (out.x_ND - out.reconstruction_ND).square().sum(1) / out.x_ND.square().sum(1)
            error += float(shares_N.double().sum())
            l0 += len(out.latents.active()[0])
        assert line["tokens"] == tokens
        assert line["norm_mse"] == pytest.approx(error / sum(sizes), rel=1e-4)
        assert line["l0"] == pytest.approx(l0 / sum(sizes), rel=1e-6)
        weighted = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
        assert line["loss"] == pytest.approx(weighted / sum(sizes), rel=1e-5)
        assert line["dead"] == pytest.approx(sum(n >= 2500 for n in idle) / 64)
        assert line["lr"] == pytest.approx(3e-3 * lr_factor(line["step"] - 1, total_steps))
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait"] < 1
        some_are_dead |= line["dead"] > 0
        promised = {"step", "tokens", "loss", "norm_mse", "l0", "dead", "lr", "tokens_per_second", "data_wait"}
        if variant["sae"] == "routesae":
            promised |= {"layer_shares", "routing_entropy"}
            routed: list[int] = []
            for out in outs:
                assert out.routing_NL is not None
                routed += [int(w_L.argmax()) for w_L in out.routing_NL]
            shares = [routed.count(at) / len(routed) for at in range(len(layers))]
            assert list(line["layer_shares"]) == [str(layer) for layer in layers]
            assert list(line["layer_shares"].values()) == pytest.approx(shares, abs=1e-6)
            entropy = -sum(share * math.log(share) for share in shares if share)
            assert line["routing_entropy"] == pytest.approx(entropy, abs=1e-5)
        assert set(line) == promised
        begin = line["step"]
    assert some_are_dead


def test_a_latent_that_never_fires_is_dead_once_it_was_idle_for_dead_after_tokens(
    tiny_cache: Cache, settings: Settings, tmp_path: Path
) -> None:
    chosen = settings(latents=8, k=4, log_every_steps=1, dead_after_tokens=3000, lr=1e-6)
    sae = build(Recipe(sae="topk", layers=(3,), width=32, latents=8, k=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc_F[2] = -1e6
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3,))
    dead = [line["dead"] for line in fitted(sae, chosen, selection, tmp_path / "log")]
    assert dead[:2] == [0, 0]
    assert dead[2:] == [1 / 8] * (len(dead) - 2)
    assert len(dead) > 4


def test_the_default_dead_after_is_a_quarter_of_a_run_also_where_a_batch_is_more_than_an_epoch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_mute_latent(recipe: Recipe, generator: torch.Generator) -> SAE:
        sae = build(recipe, generator)
        with torch.no_grad():
            sae.b_enc_F[2] = -1e6
        return sae

    monkeypatch.setattr("routesae.train.run.build", with_a_mute_latent)
    result = only(settings(latents=8, k=4, log_every_steps=1, batch_tokens=50_000, epochs=8, lr=1e-6))
    dead = [line["dead"] for line in metrics(result)]
    assert dead == [0] + [1 / 8] * 7  # one step is an epoch: a quarter of 8 is over at the second


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_the_folder_holds_the_sae_its_log_and_where_it_came_from(
    tiny_cache: Cache, settings: Settings, variant: dict[str, Any]
) -> None:
    chosen = settings(**variant, name="mine")
    result = only(chosen)
    assert result.folder == Path(chosen.out) / "mine"
    router = ["router.safetensors"] if variant["sae"] == "routesae" else []
    files = sorted(path.name for path in result.folder.iterdir())
    assert files == sorted(["cfg.json", "metrics.jsonl", "sae_weights.safetensors", *router])
    assert [path.name for path in Path(chosen.out).iterdir()] == ["mine"]
    source = json.loads((result.folder / "cfg.json").read_text())["metadata"]["routesae"]["source"]
    asked = {**chosen.to_dict(), "runs": None, "run": chosen.runs[0].to_dict()}
    assert source["settings"] == json.loads(json.dumps(asked))
    assert source["cache"]["corpus_fingerprint"] == tiny_cache.manifest.corpus_fingerprint
    assert source["cache"]["path"] == str(tiny_cache.path)  # as given, not made absolute
    assert source["model"] == tiny_cache.manifest.model
    assert source["versions"]["torch"] == torch.__version__


def test_the_held_out_score_in_cfg_json_is_that_of_the_saved_sae_on_the_held_out_rows(
    tiny_cache: Cache, settings: Settings
) -> None:
    result = only(settings(sae="routesae"))
    rows = (tiny_cache.manifest.train_rows, tiny_cache.manifest.rows)
    again = score_on_cache(load_sae(result.folder, CPU), tiny_cache, *rows)
    assert result.held_out is not None
    assert result.held_out.to_dict() == again.to_dict()
    source = json.loads((result.folder / "cfg.json").read_text())["metadata"]["routesae"]["source"]
    assert source["held_out"] == json.loads(json.dumps(again.to_dict()))


def test_default_names_tell_runs_apart(settings: Settings) -> None:
    names = [
        only(settings(**variant)).folder.name
        for variant in (*EVERY_SAE, {"sae": "topk"}, {"layer": 5, "k": 4}, {"layer": 5, "k": 4, "latents": 32})
    ]
    assert names == [
        "topk_layer3_64_k8",
        "routesae_hard_64_k8",
        "routesae_soft_64_k8",
        "topk_layer4_64_k8",  # the middle of layers 2 to 5
        "topk_layer5_64_k4",
        "topk_layer5_32_k4",
    ]


def test_expansion_is_in_widths(settings: Settings) -> None:
    assert load_sae(only(settings(latents=None, expansion=3)).folder, CPU).recipe.latents == 96


# -------------------------------------------------------------------------------------------- how long it runs


@pytest.mark.parametrize("tokens", [1, 900, 1000, 5400, 7000, 20_000])
def test_tokens_trains_that_many_within_a_step(tiny_cache: Cache, settings: Settings, tokens: int) -> None:
    last = metrics(only(settings(tokens=tokens)))[-1]
    assert abs(last["tokens"] - tokens) <= 1000


def test_epochs_trains_every_token_that_often(tiny_cache: Cache, settings: Settings) -> None:
    wanted = training_tokens(tiny_cache)
    assert wanted % 1000 > 0
    assert metrics(only(settings(name="one")))[-1]["tokens"] == wanted
    assert metrics(only(settings(name="three", epochs=3)))[-1]["tokens"] == 3 * wanted


def test_the_epochs_of_a_run_are_ordered_differently(tiny_cache: Cache, settings: Settings) -> None:
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3,))
    total_steps, plans = planned(selection, settings(epochs=2))
    blocks = [block for plan in plans for block in plan]
    assert total_steps == 2 * math.ceil(len(selection) / 1000)
    rows = [(block.shard, row) for block in blocks for row in range(block.first, block.after)]
    first, second = rows[: len(selection)], rows[len(selection) :]
    assert sorted(first) == sorted(second) == sorted(set(rows))
    assert first != second


WAYS: list[dict[str, Any]] = [
    *({"sae": sae} for sae in SAES),
    *({"sae": sae, "sparsity": 0.1} for sae in PENALISED),
    *({"sae": sae, "sparsity": 0.1, "recipe": "published"} for sae in ("vanilla", "jumprelu")),
    {"sae": "topk", "recipe": "published"},
    *({"sae": "routesae", "routed": routed} for routed in ("vanilla", "jumprelu")),
    *({"sae": "routesae", "router": router} for router in ("published", "frozen", "random")),
]
CHANGES: dict[str, Any] = {"anneal_k_from": 40, "aggregate": "mean", "balance": 5.0, "sparsity_warmup": 0.9}


def test_a_setting_is_refused_just_where_it_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunSettings, "check", lambda run: None)  # which refuses
    chosen = settings(batch_tokens=500, tokens=4000)

    def weights(out: str, of_pass: dict[str, Any], **changes: Any) -> list[dict[str, Tensor]]:
        runs = tuple(chosen.runs[0].replace(**way, **changes, name=f"way{n}") for n, way in enumerate(WAYS))
        with suppress(FailedRun):  # one learns nothing
            train(chosen.replace(runs=runs, out=str(tmp_path / out), **of_pass))
        files = [(tmp_path / out / run.name).glob("*.safetensors") for run in runs if run.name]
        return [{key: tensor for file in of for key, tensor in load_file(file).items()} for of in files]

    plain = weights("plain", {})
    for name, value in CHANGES.items():
        of_pass = {} if name in RunSettings.described else {name: value}
        changed = weights(name, of_pass, **({} if of_pass else {name: value}))
        same = [all(torch.equal(one[key], two[key]) for key in one) for one, two in zip(plain, changed, strict=True)]
        assert same == [reason_against(name, {**way, name: value}) is not None for way in WAYS], name


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": "dense"}, r"--sae 'dense' is none of vanilla, gated, topk, .*routesae"),
        ({"sae": "routesae", "layer": 3}, r"--layer 3 is not for routesae: it reads every layer"),
        ({"layer": 6}, r"layer 6 was not harvested.*2, 3, 4, 5"),
        ({"layer": 0}, r"layer 0 was not harvested"),
        ({"k": 65}, r"--k 65 is more than the SAE's 64 latents; lower it"),
        ({"anneal_k_from": 65}, r"--anneal-k-from 65 is more than the SAE's 64 latents"),
        ({"anneal_k_from": 0}, r"--anneal-k-from 0 is below 1"),
        ({"clip": -1.0}, r"--clip -1 is below 0"),
        ({"sae": "vanilla", "sparsity": -1.0}, r"--sparsity -1 is below 0"),
        ({"normalize": "layer"}, r"--normalize 'layer' is none of token, dataset, none"),
        ({"precision": "float16"}, r"--precision 'float16' is none of auto, float32, bfloat16"),
        ({"sparsity_warmup": 1.5}, r"--sparsity-warmup 1.5 is above 1"),
        ({"checkpoint_every_steps": 0}, r"--checkpoint-every 0 is below 1"),
        ({"sae": "routesae", "router": "oracle"}, r"--router 'oracle' is none of published, top2"),
        ({"sae": "routesae", "routed": "mlsae"}, r"--routed 'mlsae' is none of vanilla"),
        ({"sae": "routesae", "routing": "soft", "router": "top2"}, r"--router top2 chooses one layer a token"),
        ({"sae": "matryoshka", "prefixes": [8, 32]}, r"--prefixes \(8, 32\) must rise and end with the SAE's 64"),
        ({"recipe": "paper"}, r"--recipe 'paper' is none of routesae, published"),
        ({"latents": 64, "expansion": 2}, r"--latents 64 and --expansion 2 exclude each other"),
        ({"resume": True, "overwrite": True}, r"--resume goes on with what --overwrite would delete"),
        ({"seed": 2**32}, r"--seed 4294967296"),
        ({"k": 0}, r"--k 0 is below 1"),
        ({"latents": 0}, r"--latents 0 is below 1"),
        ({"latents": None, "expansion": -1}, r"--expansion -1 is below 1"),
        ({"batch_tokens": 0}, r"--batch-tokens 0 is below 1"),
        ({"epochs": 0}, r"--epochs 0 is below 1"),
        ({"tokens": 0}, r"--tokens 0 is below 1"),
        ({"dead_after_tokens": 0}, r"--dead-after-tokens 0 is below 1"),
        ({"log_every_steps": 0}, r"--log-every-steps 0 is below 1"),
        ({"epochs": 2, "tokens": 500}, r"--epochs 2 and --tokens 500 .*give one"),
        ({"lr": 0.0}, r"--lr 0 is not above 0"),
        ({"lr": -1e-3}, r"--lr -0.001 is not"),
        ({"lr": math.nan}, r"--lr nan is not"),
        ({"lr": math.inf}, r"--lr inf is not"),
        ({"seed": -1}, r"--seed -1 is below 0"),
        ({"sae": "routesae", "routing": "firm"}, r"--routing 'firm' is none of hard, soft"),
        ({"sae": "routesae", "aggregate": "max"}, r"--aggregate 'max' is none of sum, mean"),
        ({"name": "a/b"}, r"--name 'a/b' is not a plain folder name"),
        ({"name": "/tmp/x"}, r"--name '/tmp/x' is not"),
        ({"name": ".."}, r"--name '..' is not"),
        ({"name": ".hidden"}, r"--name '.hidden' is not"),
        ({"device": "gpu"}, r"unknown device 'gpu'; give auto, cpu, cuda"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_with_the_value_and_write_nothing(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongInput, match=message):
        only(settings(**changes))
    assert not (tmp_path / "saes").exists()


def test_cuda_where_there_is_none_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(WrongInput, match=r"--device cuda is not here.*use --device cpu or auto"):
        only(settings(device="cuda"))


def test_a_folder_that_is_no_cache_is_refused_and_says_how_to_make_one(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(WrongInput, match=rf"{path} is not a cache folder.*routesae harvest"):
            only(settings(cache=str(path)))


def test_an_incomplete_cache_is_refused_naming_the_missing_shard(
    tiny_cache: Cache, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    shutil.rmtree(copy / "shard-00001")
    with pytest.raises(WrongInput, match=r"lacks 1 of its 5 shards .*shard-00001.*harvest again"):
        only(settings(cache=str(copy)))
    assert not (tmp_path / "saes").exists()


def test_a_cut_shard_stops_training_names_it_and_leaves_no_sae(
    tiny_cache: Cache, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    data = copy / "shard-00002" / "layer_03" / "c" / "0" / "0"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(FailedRun, match=r"shard-00002/layer_03 is damaged"):
        only(settings(cache=str(copy), layer=3))
    assert visible(tmp_path / "saes") == []


# ------------------------------------------------------------------------------------- stopping, overwriting


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(progress: Progress) -> None:
    assert list(Path.cwd().glob("saes/.*.partial"))  # it is being written at this moment
    raise KeyboardInterrupt


def test_an_interrupt_leaves_no_sae_and_before_the_first_checkpoint_nothing_in_the_way(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        only(settings(), interrupt)
    assert visible(tmp_path / "saes") == []
    with pytest.raises(WrongInput, match="no SAE under"):
        find_saes(tmp_path / "saes")
    folder = only(settings()).folder
    assert list((tmp_path / "saes").iterdir()) == [folder]
    assert [line["step"] for line in logged(folder)] == [3, 6, 8]  # none of the interrupted run's


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_asked_to_stop_ends_with_a_checkpoint_in_a_hidden_folder(
    settings: Settings, tmp_path: Path, asked: signal.Signals, code: int
) -> None:
    def ask(progress: Progress) -> None:
        os.kill(os.getpid(), asked)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        Stopped, match=r"stopped after step 3 of 8; the same command with --resume goes on"
    ) as stopped:
        only(settings(name="mine"), ask)
    assert stopped.value.code == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [path.name for path in (tmp_path / "saes").iterdir()] == [".mine.partial"]
    left = sorted(contents(tmp_path / "saes" / ".mine.partial"))
    assert left == ["metrics.jsonl", "step-00000003.safetensors"]
    with pytest.raises(WrongInput, match="no SAE under"):
        find_saes(tmp_path / "saes")


def test_a_stopped_run_is_neither_started_again_nor_lost_unless_told(settings: Settings, tmp_path: Path) -> None:
    def ask(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        only(settings(name="mine"), ask)
    left = contents(tmp_path / "saes")
    refusal = r"mine was stopped after step 3; --resume continues it, --overwrite starts again"
    with pytest.raises(WrongInput, match=refusal):
        only(settings(name="mine"))
    assert contents(tmp_path / "saes") == left
    only(settings(name="other"))
    folder = only(settings(name="mine", seed=7, overwrite=True)).folder
    assert [line["step"] for line in logged(folder)] == [3, 6, 8]
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == ["mine", "other"]


def test_a_second_ctrl_c_interrupts_at_once(settings: Settings, tmp_path: Path) -> None:
    def ask_twice(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        only(settings(name="mine"), ask_twice)
    assert sorted(contents(tmp_path / "saes" / ".mine.partial")) == ["metrics.jsonl"]


@pytest.mark.parametrize("stage", ["train topk", "score on cache"])
def test_a_stopped_run_leaves_no_loader_thread_though_its_traceback_is_kept(settings: Settings, stage: str) -> None:
    def interrupt_stage(progress: Progress) -> None:
        if progress.stage.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        only(settings(batch_tokens=500), interrupt_stage)
    assert [thread.name for thread in threading.enumerate() if thread.name == "batch-loader"] == []
    assert stopped.tb is not None


def test_a_dictionary_that_is_mostly_dead_is_remarked_on_with_the_remedy(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    for k, batch_tokens, warned in ((1, 8, True), (32, 512, False)):
        caplog.clear()
        only(settings(name=f"k{k}", k=k, batch_tokens=batch_tokens, tokens=1024, dead_after_tokens=1))
        lines = [record.getMessage() for record in caplog.records if "are dead" in record.getMessage()]
        assert bool(lines) == warned, lines
        assert not warned or all(word in lines[0] for word in ("k1", " % of its latents", "--latents", "--k"))


def test_ctrl_c_while_the_held_out_rows_are_scored_leaves_no_sae(settings: Settings, tmp_path: Path) -> None:
    def interrupt_scoring(progress: Progress) -> None:
        if progress.stage == "score on cache":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        only(settings(name="mine"), interrupt_scoring)
    assert visible(tmp_path / "saes") == []
    only(settings(name="mine", resume=True))  # every step is done: it is only scored and saved
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]


def test_what_a_killed_run_left_behind_does_not_end_up_in_the_next_sae(settings: Settings, tmp_path: Path) -> None:
    left = tmp_path / "saes" / ".mine.partial"
    left.mkdir(parents=True)
    (left / "junk").write_text("x")
    result = only(settings(name="mine"))
    assert not (result.folder / "junk").exists()
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]


def test_an_existing_sae_is_kept_unless_overwrite_is_given(settings: Settings) -> None:
    folder = only(settings(name="mine")).folder
    old = contents(folder)
    with pytest.raises(WrongInput, match=rf"{folder} exists; give another --name, or --overwrite"):
        only(settings(name="mine", seed=1))
    assert contents(folder) == old
    only(settings(name="mine", seed=1, overwrite=True))
    assert contents(folder)["sae_weights.safetensors"] != old["sae_weights.safetensors"]


def test_overwrite_keeps_the_old_sae_where_the_new_run_fails(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = only(settings(name="mine")).folder
    old = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        only(settings(name="mine", overwrite=True), interrupt)
    with pytest.raises(FailedRun):
        only(settings(name="mine", overwrite=True, lr=1e30))
    with pytest.raises(WrongInput):
        only(settings(name="mine", overwrite=True, layer=6))
    assert contents(folder) == old
    assert visible(tmp_path / "saes") == ["mine"]
    load_sae(folder, CPU)


def test_overwrite_does_not_delete_a_folder_that_holds_no_sae(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "saes" / "mine").mkdir(parents=True)
    (tmp_path / "saes" / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(WrongInput, match=r"mine.*not an SAE"):
        only(settings(name="mine", overwrite=True))
    assert (tmp_path / "saes" / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_a_loss_that_is_no_number_stops_the_run_with_the_rate_to_lower(
    settings: Settings, tmp_path: Path, variant: dict[str, Any]
) -> None:
    with pytest.raises(
        FailedRun, match=r"the (loss is|weights are) NaN or infinite at step [1-3]; lower --lr 1e\+30"
    ):
        only(settings(**variant, lr=1e30))
    assert visible(tmp_path / "saes") == []


@pytest.mark.parametrize("lines_every", [1, 1000])
def test_a_loss_that_becomes_no_number_names_its_step_and_keeps_the_last_good_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines_every: int
) -> None:
    given = {"name": "mine", "log_every_steps": lines_every, "checkpoint_every_steps": 2}
    with monkeypatch.context() as patched:
        patched.setattr("routesae.train.run.load", lambda *given: poisoned_from(5, load(*given)))
        with pytest.raises(FailedRun, match=r"^the loss is NaN or infinite at step 5; lower --lr 0\.003$"):
            only(settings(**given))
    (kept,) = (tmp_path / "saes" / ".mine.partial").glob("step-*")
    assert kept.name == "step-00000004.safetensors"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept).values())
    assert_resumes_to_what_an_uninterrupted_run_gives(settings, given, tmp_path)


def test_weights_that_become_no_numbers_are_found_before_they_replace_a_checkpoint(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is still finite: it is that of the weights before it."""
    given = {"name": "mine", "checkpoint_every_steps": 1, "log_every_steps": 1000}
    inner = Trainee.step

    def broken_at_4(trainee: Trainee, step: int, hidden: Hidden, tokens: int) -> None:
        inner(trainee, step, hidden, tokens)
        if step == 4:
            trainee.adam.squares[0].view(-1)[0] = torch.inf

    with monkeypatch.context() as patched:
        patched.setattr(Trainee, "step", broken_at_4)
        with pytest.raises(FailedRun, match=r"^the weights are NaN or infinite at step 4; lower --lr 0\.003$"):
            only(settings(**given))
    assert [path.name for path in (tmp_path / "saes" / ".mine.partial").glob("step-*")] == [
        "step-00000003.safetensors"
    ]
    assert_resumes_to_what_an_uninterrupted_run_gives(settings, given, tmp_path)


def poisoned_from(step: int, batches: Batches) -> Iterator[Batch]:
    with closing(batches):
        for at, batch in enumerate(batches, start=1):
            yield batch._replace(hidden_LND=batch.hidden_LND * torch.nan) if at >= step else batch


def assert_resumes_to_what_an_uninterrupted_run_gives(
    settings: Settings, given: dict[str, Any], tmp_path: Path
) -> None:
    resumed = only(settings(**given, resume=True)).folder
    whole = only(settings(**given, out=str(tmp_path / "whole"))).folder
    assert (resumed / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_a_run_whose_last_step_broke_the_weights_writes_no_sae(settings: Settings, tmp_path: Path) -> None:
    # One step: its loss is still that of the initial weights, and only what it leaves behind is useless.
    with pytest.raises(FailedRun, match=r"lower --lr 1e\+30"):
        only(settings(lr=1e30, tokens=1))
    assert visible(tmp_path / "saes") == []


# ----------------------------------------------------------------------------------------- two at once, and the end


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_second_training_of_one_name_is_refused_at_once_naming_the_owner(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    refusals: list[str] = []

    def start_another(progress: Progress) -> None:
        if not refusals:
            before = contents(tmp_path / "saes" / ".mine.partial")
            with pytest.raises(WrongInput) as refused:
                only(settings(name="mine", **changes))
            refusals.append(str(refused.value))
            assert contents(tmp_path / "saes" / ".mine.partial") == before

    only(settings(name="mine", checkpoint_every_steps=2), start_another)
    (message,) = refusals
    assert message.startswith(f"the SAE {tmp_path / 'saes' / 'mine'} is in use by process {os.getpid()} on ")
    assert visible(tmp_path / "saes") == ["mine"]
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]  # the lock is gone


def test_an_owner_that_was_killed_leaves_its_name_free(settings: Settings, tmp_path: Path) -> None:
    flags = ("--sae", "topk", "--latents", "64", "--name", "mine", "--batch-tokens", "100", "--epochs", "1000")
    run = Command("train", "--cache", settings().cache, *flags, cwd=tmp_path)
    metrics = tmp_path / "saes" / ".mine.partial" / "metrics.jsonl"
    while not metrics.exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.kill()
    assert run.wait(60) == -signal.SIGKILL
    assert (tmp_path / "saes" / ".mine.lock").exists()
    only(settings(name="mine", overwrite=True))
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]


def test_a_folder_that_vanishes_is_made_again_at_the_next_save_with_every_line(
    settings: Settings, tmp_path: Path
) -> None:
    def delete(progress: Progress) -> None:
        if progress.done == 4:
            shutil.rmtree(tmp_path / "saes")

    chosen = {"name": "mine", "log_every_steps": 2, "checkpoint_every_steps": 3}
    folder = only(settings(**chosen), delete).folder
    assert [line["step"] for line in logged(folder)] == [2, 4, 6, 8]
    whole = only(settings(**chosen, out=str(tmp_path / "whole"))).folder
    assert (folder / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_a_folder_that_vanished_and_is_now_another_runs_is_left_to_that(settings: Settings, tmp_path: Path) -> None:
    """The lock went with the folder, so another process could begin there."""
    out, others = tmp_path / "saes", []

    def delete(progress: Progress) -> None:
        if progress.done == 3:
            shutil.rmtree(out)
            out.mkdir()
            others.append(Lock(out / ".mine.lock"))
            assert others[0].take()

    with pytest.raises(FailedRun, match=r"\.mine\.lock was deleted, and another process trains there now"):
        only(settings(name="mine", checkpoint_every_steps=3), delete)
    assert [path.name for path in out.iterdir()] == [".mine.lock"]
    others[0].release()


def test_a_folder_that_vanishes_while_the_sae_is_scored_is_made_again_with_every_line(
    settings: Settings, tmp_path: Path
) -> None:
    def delete(progress: Progress) -> None:
        if progress.stage == "score on cache":
            shutil.rmtree(tmp_path / "saes", ignore_errors=True)

    folder = only(settings(name="mine", log_every_steps=2), delete).folder
    assert [line["step"] for line in logged(folder)] == [2, 4, 6, 8]
    assert load_sae(folder, CPU).recipe.sae == "topk"


@pytest.mark.parametrize("answers", ["interpretations.json", "interpretations.jsonl", "contexts.json", "notes.txt"])
def test_overwrite_keeps_what_train_did_not_write_with_the_sae_it_belongs_to(
    settings: Settings, tmp_path: Path, answers: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = only(settings(name="mine")).folder
    (folder / answers).write_text("paid for")
    old = contents(folder)
    for number in (1, 2):
        only(settings(name="mine", lr=1e-3, overwrite=True))
        assert answers not in contents(folder)
        assert contents(tmp_path / "saes" / "replaced" / "mine-1") == old
        (folder / answers).write_text(f"paid for again {number}")
    assert "is kept as" in caplog.text
    assert answers in caplog.text
    assert (tmp_path / "saes" / "replaced" / "mine-2" / answers).read_text() == "paid for again 1"
    assert find_saes(tmp_path / "saes") == [folder]  # what was replaced is not scored again


def test_overwrite_leaves_nothing_of_an_sae_that_holds_only_what_train_wrote(
    settings: Settings, tmp_path: Path
) -> None:
    for _ in range(2):
        only(settings(name="mine", overwrite=True))
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]


def test_a_kill_while_an_sae_is_replaced_loses_neither(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = only(settings(name="mine")).folder
    (folder / "interpretations.json").write_text("paid for")
    real = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".mine.partial":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        only(settings(name="mine", overwrite=True))
    monkeypatch.undo()
    only(settings(name="mine", resume=True))
    assert (tmp_path / "saes" / "replaced" / "mine-1" / "interpretations.json").read_text() == "paid for"
    assert load_sae(folder, CPU).recipe.sae == "topk"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            r"no room left at OUT \(No space left on device\): the last checkpoint stays; make room",
        ),
        (
            errno.EROFS,
            r"OUT can no longer be written \(Read-only file system\): the last checkpoint stays",
        ),
    ],
)
@pytest.mark.parametrize("at", ["metrics.jsonl", "step-", "sae_weights", "cfg.json"])
def test_a_disk_that_takes_no_more_is_one_line_with_resume_which_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, number: int, message: str
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if at in name and newest_step([tmp_path / "saes" / ".mine.partial"]):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    chosen = {"name": "mine", "checkpoint_every_steps": 3}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FailedRun, match=message.replace("OUT", str(tmp_path / "saes"))) as end:
        only(settings(**chosen))
    monkeypatch.undo()
    assert str(end.value).endswith("give the same command with --resume")
    assert "\n" not in str(end.value)
    left = [path.name for path in (tmp_path / "saes" / ".mine.partial").iterdir()]
    assert not [name for name in left if name.startswith(".")]  # no partial file stays on a full disk
    folder = only(settings(**chosen, resume=True)).folder
    whole = only(settings(**chosen, out=str(tmp_path / "whole"))).folder
    assert (folder / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_metrics_are_not_written_through_a_link(settings: Settings, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        only(settings(name="mine", checkpoint_every_steps=3), stop)
    partial = tmp_path / "saes" / ".mine.partial"
    (tmp_path / "mine").write_bytes((partial / "metrics.jsonl").read_bytes())
    (partial / "metrics.jsonl").unlink()
    (partial / "metrics.jsonl").symlink_to(tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    with pytest.raises(WrongInput, match=r"metrics\.jsonl is a symbolic link"):
        only(settings(name="mine", checkpoint_every_steps=3, resume=True))
    assert (tmp_path / "mine").read_bytes() == before


def test_a_line_of_metrics_that_was_altered_is_named_and_not_drawn(settings: Settings) -> None:
    folder = only(settings(name="mine", log_every_steps=2)).folder
    path = folder / "metrics.jsonl"
    data = path.read_bytes()
    rng = random.Random(0)
    lines = read_metrics(folder)
    for at in rng.sample(range(len(data)), 200):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(7)
        path.write_bytes(flipped)
        try:
            back = read_metrics(folder)
        except WrongInput as refused:
            assert f"line {data[:at].count(10) + 1} of {path} cannot be read (" in str(refused)  # noqa: PT017
        else:  # the name of the hash itself, or white space
            assert [{name: line[name] for name in lines[0]} for line in back] == lines
    path.write_text('{"step": 1, "loss": 0.5}\n')  # of an earlier version
    assert read_metrics(folder) == [{"step": 1, "loss": 0.5}]


def test_an_sae_worse_than_the_mean_of_its_input_is_kept_said_and_a_failed_run(
    settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "saes" / "mine"
    with pytest.raises(FailedRun, match=rf"^{folder} ended worse than the mean of its input.*FVU .*lower --lr"):
        only(settings(name="mine", lr=100.0))
    assert load_sae(folder, CPU).recipe.sae == "topk"
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]
    with pytest.raises(WrongInput, match=r"exists; give another --name, or --overwrite"):
        only(settings(name="mine", lr=100.0))


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_max_memory_bounds_the_rows_encoded_at_a_time_and_changes_no_result(
    tiny_cache: Cache,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: dict[str, Any],
) -> None:
    widest = 0
    inner = search.pre_activations

    def watched(*args: Any) -> Iterator[tuple[slice, Tensor]]:
        nonlocal widest
        for rows, z_nF in inner(*args):
            widest = max(widest, z_nF.numel() * 4)
            yield rows, z_nF

    monkeypatch.setattr(search, "pre_activations", watched)
    free = only(settings(**variant, latents=128, out=str(tmp_path / "free")))
    unbounded, widest = widest, 0
    limit = unbounded // 3
    bounded = only(settings(**variant, latents=128, out=str(tmp_path / "bounded"), max_memory=limit))
    assert 0 < widest <= limit < unbounded
    errors = [[line["norm_mse"] for line in metrics(result)] for result in (free, bounded)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_a_max_memory_below_one_token_is_refused_with_what_it_takes(tiny_cache: Cache, settings: Settings) -> None:
    with pytest.raises(
        WrongInput, match=r"--max-memory 7 bytes do not hold the 64 pre-activations .* give 256 or more"
    ):
        train(settings(sae="topk", layer=3, latents=64, max_memory=7))


def test_the_record_of_an_sae_does_not_say_how_often_its_run_was_begun(settings: Settings, tmp_path: Path) -> None:
    flags: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
    written = [(only(settings(**more)).folder / "cfg.json").read_bytes() for more in flags[:1]]
    for more in flags[1:]:
        shutil.rmtree(tmp_path / "saes")
        written.append((only(settings(**more)).folder / "cfg.json").read_bytes())
    assert written[0] == written[1] == written[2]
