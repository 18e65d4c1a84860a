"""The stage train, end to end on a tiny cache: it learns, repeats, logs, refuses, and leaves no half-written SAE."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae.harvest.cache import Cache
from routesae.reporting import FailedRun, Progress, WrongInput
from routesae.train.batches import Selection
from routesae.train.checkpoint import find_saes, load_sae
from routesae.train.evaluate import score_on_cache
from routesae.train.run import INITIAL_SAMPLE_TOKENS, TrainResult, fit, planned, train
from routesae.train.saes import SAE, SAES, Forward, Recipe, TopK
from routesae.train.schedule import lr_factor
from routesae.train.settings import TrainSettings

CPU = torch.device("cpu")
EVERY_SAE: list[dict[str, Any]] = [
    {"sae": "topk", "layer": 3},
    {"sae": "routesae"},
    {"sae": "routesae", "routing": "soft"},
]
IDS = ["topk", "hard", "soft"]


@pytest.fixture
def settings(tiny_cache: Cache, tmp_path: Path) -> Callable[..., TrainSettings]:
    """A run of 8 or 9 steps on 7,000-odd tokens, into tmp_path/saes."""

    def make(**changes: Any) -> TrainSettings:
        given: dict[str, Any] = {
            "cache": str(tiny_cache.path),
            "sae": "topk",
            "latents": 64,
            "k": 8,
            "batch_tokens": 1000,
            "log_every_steps": 3,
            "lr": 3e-3,
            "device": "cpu",
            "out": str(tmp_path / "saes"),
        }
        return TrainSettings(**{**given, **changes})

    return make


Settings = Callable[..., TrainSettings]


def metrics(result: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def training_tokens(cache: Cache) -> int:
    return len(Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers[:1]))


def untrained(trained: SAE) -> SAE:
    """The same recipe and seed, before any step."""
    return SAES[trained.recipe.sae](trained.recipe, torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------- learning, repeating


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_training_reconstructs_far_better_than_an_untrained_sae(
    tiny_cache: Cache, settings: Settings, variant: dict[str, Any]
) -> None:
    result = train(settings(**variant, epochs=6, batch_tokens=500, latents=128))
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
        folder = train(settings(**variant, name=name, seed=seed)).folder
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
        return dict(load_sae(train(chosen).folder, CPU).named_parameters())

    first, second = weights(5), weights(6)
    for name in first:
        if "b_" not in name:
            assert (first[name] - second[name]).abs().mean() > 0.05, name


def test_training_starts_with_the_decoder_bias_at_the_median_of_the_training_tokens(
    tiny_cache: Cache, settings: Settings
) -> None:
    folder = train(settings(lr=1e-12, batch_tokens=50_000, layer=4)).folder
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


def test_two_runs_on_two_threads_give_the_same_bytes(settings: Settings) -> None:
    torch.set_num_threads(2)
    first, second = (
        train(settings(sae="routesae", name=name)).folder / "sae_weights.safetensors" for name in ("a", "b")
    )
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_every_weight_moves_and_the_decoder_ends_at_unit_norm(settings: Settings, variant: dict[str, Any]) -> None:
    trained = load_sae(train(settings(**variant)).folder, CPU)
    start = dict(untrained(trained).named_parameters())
    for name, parameter in trained.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    W_dec_FD = dict(trained.named_parameters())["W_dec_FD" if variant["sae"] == "topk" else "shared.W_dec_FD"]
    torch.testing.assert_close(W_dec_FD.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------- what is logged


class Recorded:
    """What every step of a run saw and gave, taken by hooks: latents, loss, dead latents, routing."""

    def __init__(self, sae: SAE, monkeypatch: pytest.MonkeyPatch):
        self.outs: list[Forward] = []
        self.losses: list[float] = []
        self.dead: list[Tensor] = []
        inner = sae.loss

        def loss(out: Forward, dead_F: Tensor) -> Tensor:
            given = inner(out, dead_F)
            self.outs.append(Forward(*(part if part is None else _detached(part) for part in out)))
            self.losses.append(given.item())
            self.dead.append(dead_F.clone())
            return given

        monkeypatch.setattr(sae, "loss", loss)


def _detached(part: Any) -> Any:
    return part.detach().clone() if isinstance(part, Tensor) else type(part)(*(x.detach().clone() for x in part))


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_the_log_says_of_each_stretch_of_steps_what_the_steps_did(
    tiny_cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    chosen = settings(**variant, epochs=2, dead_after_tokens=2500, k=2)
    layers = (3,) if variant["sae"] == "topk" else tiny_cache.manifest.layers
    routing = variant.get("routing", "hard")
    recipe = Recipe(sae=chosen.sae, layers=layers, width=32, latents=64, k=2, routing=routing)
    sae = SAES[chosen.sae](recipe, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dict(sae.named_parameters())["b_enc_F" if chosen.sae == "topk" else "shared.b_enc_F"][:3] = -1e6
    recorded = Recorded(sae, monkeypatch)
    file = io.StringIO()
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, layers)
    seen: list[Progress] = []
    fit(sae, selection, chosen, file, seen.append)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]

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
            assert recorded.dead[begin + at].tolist() == [n >= 2500 for n in idle]
            fired = set(out.latents.indices_NK[out.latents.values_NK > 0].tolist())
            idle = [0 if latent in fired else n + size for latent, n in enumerate(idle)]
        tokens += sum(sizes)
        error = l0 = 0.0
        for out in outs:
            shares_N = (out.x_ND - out.reconstruction_ND).square().sum(1) / out.x_ND.square().sum(1)
            error += float(shares_N.double().sum())
            l0 += int((out.latents.values_NK > 0).sum())
        assert line["tokens"] == tokens
        assert line["norm_mse"] == pytest.approx(error / sum(sizes), rel=1e-4)
        assert line["l0"] == pytest.approx(l0 / sum(sizes), rel=1e-6)
        weighted = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
        assert line["loss"] == pytest.approx(weighted / sum(sizes), rel=1e-5)
        assert line["dead"] == pytest.approx(sum(n >= 2500 for n in idle) / 64)
        assert line["lr"] == pytest.approx(chosen.lr * lr_factor(line["step"] - 1, total_steps))
        assert line["tokens_per_second"] > 0
        some_are_dead |= line["dead"] > 0
        promised = {"step", "tokens", "loss", "norm_mse", "l0", "dead", "lr", "tokens_per_second"}
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
    tiny_cache: Cache, settings: Settings
) -> None:
    chosen = settings(latents=8, k=4, log_every_steps=1, dead_after_tokens=3000, lr=1e-6)
    sae = TopK(Recipe(sae="topk", layers=(3,), width=32, latents=8, k=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc_F[2] = -1e6
    file = io.StringIO()
    fit(sae, Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3,)), chosen, file)
    dead = [json.loads(line)["dead"] for line in file.getvalue().splitlines()]
    assert dead[:2] == [0, 0]
    assert dead[2:] == [1 / 8] * (len(dead) - 2)
    assert len(dead) > 4


def test_the_default_dead_after_is_a_quarter_of_a_run_also_where_a_batch_is_more_than_an_epoch(
    tiny_cache: Cache, settings: Settings
) -> None:
    chosen = settings(latents=8, k=4, log_every_steps=1, batch_tokens=50_000, epochs=8, lr=1e-6)
    sae = TopK(Recipe(sae="topk", layers=(3,), width=32, latents=8, k=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc_F[2] = -1e6
    file = io.StringIO()
    fit(sae, Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3,)), chosen, file)
    dead = [json.loads(line)["dead"] for line in file.getvalue().splitlines()]
    assert dead == [0] + [1 / 8] * 7  # one step is an epoch: a quarter of 8 is over at the second


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_the_folder_holds_the_sae_its_log_and_where_it_came_from(
    tiny_cache: Cache, settings: Settings, variant: dict[str, Any]
) -> None:
    chosen = settings(**variant, name="mine")
    result = train(chosen)
    assert result.folder == Path(chosen.out) / "mine"
    router = ["router.safetensors"] if variant["sae"] == "routesae" else []
    files = sorted(path.name for path in result.folder.iterdir())
    assert files == sorted(["cfg.json", "metrics.jsonl", "sae_weights.safetensors", *router])
    assert [path.name for path in Path(chosen.out).iterdir()] == ["mine"]
    source = json.loads((result.folder / "cfg.json").read_text())["metadata"]["routesae"]["source"]
    assert source["settings"] == dataclasses.asdict(chosen)
    assert source["cache"]["corpus_fingerprint"] == tiny_cache.manifest.corpus_fingerprint
    assert source["cache"]["path"] == str(tiny_cache.path.resolve())
    assert source["model"] == tiny_cache.manifest.model
    assert source["versions"]["torch"] == torch.__version__


def test_the_held_out_score_in_cfg_json_is_that_of_the_saved_sae_on_the_held_out_rows(
    tiny_cache: Cache, settings: Settings
) -> None:
    result = train(settings(sae="routesae"))
    rows = (tiny_cache.manifest.train_rows, tiny_cache.manifest.rows)
    again = score_on_cache(load_sae(result.folder, CPU), tiny_cache, *rows)
    assert result.held_out is not None
    assert result.held_out.to_dict() == again.to_dict()
    source = json.loads((result.folder / "cfg.json").read_text())["metadata"]["routesae"]["source"]
    assert source["held_out"] == json.loads(json.dumps(again.to_dict()))


def test_default_names_tell_runs_apart(settings: Settings) -> None:
    names = [
        train(settings(**variant)).folder.name
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
    assert load_sae(train(settings(latents=None, expansion=3)).folder, CPU).recipe.latents == 96


# -------------------------------------------------------------------------------------------- how long it runs


@pytest.mark.parametrize("tokens", [1, 900, 1000, 5400, 7000, 20_000])
def test_tokens_trains_that_many_within_a_step(tiny_cache: Cache, settings: Settings, tokens: int) -> None:
    last = metrics(train(settings(tokens=tokens)))[-1]
    assert abs(last["tokens"] - tokens) <= 1000


def test_epochs_trains_every_token_that_often(tiny_cache: Cache, settings: Settings) -> None:
    wanted = training_tokens(tiny_cache)
    assert wanted % 1000 > 0
    assert metrics(train(settings(name="one")))[-1]["tokens"] == wanted
    assert metrics(train(settings(name="three", epochs=3)))[-1]["tokens"] == 3 * wanted


def test_the_epochs_of_a_run_are_ordered_differently(tiny_cache: Cache, settings: Settings) -> None:
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3,))
    total_steps, plans = planned(selection, settings(epochs=2))
    blocks = [block for plan in plans for block in plan]
    assert total_steps == 2 * math.ceil(len(selection) / 1000)
    rows = [(block.shard, row) for block in blocks for row in range(block.first, block.after)]
    first, second = rows[: len(selection)], rows[len(selection) :]
    assert sorted(first) == sorted(second) == sorted(set(rows))
    assert first != second


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": "gated"}, r"--sae 'gated' is none of routesae, topk"),
        ({"sae": "routesae", "layer": 3}, r"--layer 3 is for topk; routesae reads every layer"),
        ({"layer": 6}, r"layer 6 was not harvested.*2, 3, 4, 5"),
        ({"layer": 0}, r"layer 0 was not harvested"),
        ({"k": 65}, r"--k 65 is more than the SAE's 64 latents; lower it"),
        ({"k": 0}, r"--k 0 is below 1"),
        ({"latents": 0}, r"--latents 0 is below 1"),
        ({"latents": None, "expansion": -1}, r"--expansion -1 is below 1"),
        ({"batch_tokens": 0}, r"--batch-tokens 0 is below 1"),
        ({"epochs": 0}, r"--epochs 0 is below 1"),
        ({"tokens": 0}, r"--tokens 0 is below 1"),
        ({"dead_after_tokens": 0}, r"--dead-after-tokens 0 is below 1"),
        ({"log_every_steps": 0}, r"--log-every-steps 0 is below 1"),
        ({"epochs": 2, "tokens": 500}, r"--epochs 2 and --tokens 500 .*give one"),
        ({"lr": 0.0}, r"--lr 0.0 is not"),
        ({"lr": -1e-3}, r"--lr -0.001 is not"),
        ({"lr": math.nan}, r"--lr nan is not"),
        ({"lr": math.inf}, r"--lr inf is not"),
        ({"seed": -1}, r"--seed -1 is below 0"),
        ({"sae": "routesae", "routing": "firm"}, r"--routing 'firm' is none of hard, soft"),
        ({"sae": "routesae", "aggregate": "max"}, r"--aggregate 'max' is none of sum, mean"),
        ({"name": "a/b"}, r"--name 'a/b' must be a plain folder name"),
        ({"name": "/tmp/x"}, r"--name '/tmp/x' must be"),
        ({"name": ".."}, r"--name '..' must be"),
        ({"name": ".hidden"}, r"--name '.hidden' must be"),
        ({"device": "gpu"}, r"device 'gpu' is none of auto, cpu, cuda"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_with_the_value_and_write_nothing(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongInput, match=message):
        train(settings(**changes))
    assert not (tmp_path / "saes").exists()


def test_cuda_where_there_is_none_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(WrongInput, match=r"device cuda asked for.*use --device cpu or auto"):
        train(settings(device="cuda"))


def test_a_folder_that_is_no_cache_is_refused_and_says_how_to_make_one(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(WrongInput, match=rf"{path} is not a cache folder.*routesae harvest"):
            train(settings(cache=str(path)))


def test_an_incomplete_cache_is_refused_naming_the_missing_shard(
    tiny_cache: Cache, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    shutil.rmtree(copy / "shard-00001")
    with pytest.raises(WrongInput, match=r"lacks 1 of its 5 shards .*shard-00001.*harvest again"):
        train(settings(cache=str(copy)))
    assert not (tmp_path / "saes").exists()


def test_a_cut_shard_stops_training_names_it_and_leaves_nothing(
    tiny_cache: Cache, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    data = copy / "shard-00002" / "layer_03" / "c" / "0" / "0"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(FailedRun, match=r"shard-00002/layer_03 is damaged"):
        train(settings(cache=str(copy), layer=3))
    assert list((tmp_path / "saes").iterdir()) == []


# ------------------------------------------------------------------------------------- stopping, overwriting


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(progress: Progress) -> None:
    assert list(Path.cwd().glob("saes/.*.partial"))  # it is being written at this moment
    raise KeyboardInterrupt


def test_ctrl_c_leaves_no_sae_and_no_partial_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(settings(), interrupt)
    assert list((tmp_path / "saes").iterdir()) == []
    with pytest.raises(WrongInput, match="no SAE under"):
        find_saes(tmp_path / "saes")


@pytest.mark.parametrize("stage", ["train topk", "score on cache"])
def test_a_stopped_run_leaves_no_loader_thread_though_its_traceback_is_kept(settings: Settings, stage: str) -> None:
    def interrupt_stage(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        train(settings(batch_tokens=500), interrupt_stage)
    assert [thread.name for thread in threading.enumerate() if thread.name == "batch-loader"] == []
    assert stopped.tb is not None


def test_ctrl_c_while_the_held_out_rows_are_scored_leaves_no_sae(settings: Settings, tmp_path: Path) -> None:
    def interrupt_scoring(progress: Progress) -> None:
        if progress.stage == "score on cache":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(), interrupt_scoring)
    assert list((tmp_path / "saes").iterdir()) == []


def test_what_a_killed_run_left_behind_does_not_end_up_in_the_next_sae(settings: Settings, tmp_path: Path) -> None:
    left = tmp_path / "saes" / ".mine.partial"
    left.mkdir(parents=True)
    (left / "junk").write_text("x")
    result = train(settings(name="mine"))
    assert not (result.folder / "junk").exists()
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["mine"]


def test_an_existing_sae_is_kept_unless_overwrite_is_given(settings: Settings) -> None:
    folder = train(settings(name="mine")).folder
    old = contents(folder)
    with pytest.raises(WrongInput, match=rf"{folder} exists; give another --name, or --overwrite"):
        train(settings(name="mine", seed=1))
    assert contents(folder) == old
    train(settings(name="mine", seed=1, overwrite=True))
    assert contents(folder)["sae_weights.safetensors"] != old["sae_weights.safetensors"]


def test_overwrite_keeps_the_old_sae_where_the_new_run_fails(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = train(settings(name="mine")).folder
    old = contents(tmp_path / "saes")
    with pytest.raises(KeyboardInterrupt):
        train(settings(name="mine", overwrite=True), interrupt)
    with pytest.raises(FailedRun):
        train(settings(name="mine", overwrite=True, lr=1e30))
    with pytest.raises(WrongInput):
        train(settings(name="mine", overwrite=True, layer=6))
    assert contents(tmp_path / "saes") == old
    load_sae(folder, CPU)


def test_overwrite_does_not_delete_a_folder_that_holds_no_sae(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "saes" / "mine").mkdir(parents=True)
    (tmp_path / "saes" / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(WrongInput, match=r"mine.*not an SAE"):
        train(settings(name="mine", overwrite=True))
    assert (tmp_path / "saes" / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("variant", EVERY_SAE, ids=IDS)
def test_a_loss_that_is_no_number_stops_the_run_with_the_rate_to_lower(
    settings: Settings, tmp_path: Path, variant: dict[str, Any]
) -> None:
    with pytest.raises(FailedRun, match=r"the loss is (nan|inf) by step 3 of \d+; lower --lr 1e\+30"):
        train(settings(**variant, lr=1e30))
    assert list((tmp_path / "saes").iterdir()) == []


def test_a_run_whose_last_step_broke_the_weights_writes_no_sae(settings: Settings, tmp_path: Path) -> None:
    # One step: its loss is still that of the initial weights, and only what it leaves behind is useless.
    with pytest.raises(FailedRun, match=r"lower --lr 1e\+30"):
        train(settings(lr=1e30, tokens=1))
    assert list((tmp_path / "saes").iterdir()) == []
