"""What runs on a CPU runs on CUDA, and comes to the same: `pytest -m gpu` on a machine with a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from routesae.analyze.clamp.run import clamp
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.contexts.file import read_contexts
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.api import latents, load_lm, load_sae, steer
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.train.jobs import jobs_of
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.run import TrainSettings, train
from routesae.train.saes import SAES, Recipe, build
from routesae.train.saes.matryoshka import default_prefixes
from routesae.train.saes.normalise import Hidden
from routesae.train.saes.topk import TopK
from routesae.train.sparse import policy
from routesae.train.sparse.policy import chosen

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
LAYERS, WIDTH, LATENTS, K, TOKENS = 3, 128, 1024, 8, 512
STEPS = 20
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def exactly() -> Iterator[None]:
    """float32 products in float32, so that they can be compared with a CPU's."""
    with policy._tf32(False):
        yield


def recipe_of(name: str) -> Recipe:
    layers = (1,) if name in SAES and SAES[name].one_layer else tuple(range(1, LAYERS + 1))
    prefixes = default_prefixes(LATENTS) if name == "matryoshka" else ()
    return Recipe(sae=name, layers=layers, width=WIDTH, latents=LATENTS, k=K, prefixes=prefixes, normalize="none")


def rows(layers: int, seed: int) -> Tensor:
    """[L, N, D]: sums of a few of fixed directions, so that there is something to learn."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (0, seed + 1))
    directions_FD = torch.randn(256, WIDTH, generator=fixed)
    at = torch.randint(256, (layers, TOKENS, 6), generator=drawn)
    return directions_FD[at].sum(2)


def steps(
    name: str,
    device: torch.device,
    count: int,
    precision: torch.dtype = torch.float32,
    sparse_below: float | None = None,
) -> dict[str, Any]:
    """NormMSE of each step, and gradients and latents of the first. sparse_below: None for the device's own."""
    torch.manual_seed(0)
    sae = build(recipe_of(name), torch.Generator().manual_seed(0)).to(device).train()
    layers = len(sae.recipe.layers)
    how = chosen(device.type, bfloat16_units=True, precision=str(precision).removeprefix("torch."))
    sae.arithmetic = how if sparse_below is None else how.replace(sparse_below=sparse_below)

    def hidden(seed: int) -> Hidden:
        return Hidden(rows(layers, seed).to(device), layers=sae.recipe.layers)

    sae.initialise(hidden(99))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)
    dead_d = torch.arange(LATENTS // 8, device=device)
    found: dict[str, Any] = {"curve": []}
    for step in range(1, count + 1):
        torch.manual_seed(step)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            out = sae(hidden(step))
            objective = sae.loss(out, dead_d)
        adam.zero_grad()
        objective.total.backward()  # type: ignore[no-untyped-call]
        if step == 1:
            found |= {of: p.grad.cpu().clone() for of, p in sae.named_parameters() if p.grad is not None}
            found["counts"] = out.latents.active_counts.cpu()
        sae.project_gradient()
        adam.step()
        sae.normalise_decoder(step)
        found["curve"].append(objective.norm_mse.item())
    return found


@pytest.mark.parametrize("name", SAES)
def test_a_step_and_its_gradients_are_a_cpus(name: str) -> None:
    ours, cpus = (steps(name, device, 1) for device in (DEVICE, CPU))
    assert ours.keys() == cpus.keys()
    for of in ours.keys() - {"curve", "counts"}:
        if cpus[of].any():
            assert (ours[of] - cpus[of]).norm() / cpus[of].norm() < 1e-4, of
    assert ours["curve"] == pytest.approx(cpus["curve"], rel=1e-4)
    assert (ours["counts"] - cpus["counts"]).abs().sum() <= TOKENS * K // 1000  # where two pre-activations are a tie


@pytest.mark.parametrize(("precision", "within"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("name", SAES)
def test_twenty_steps_have_a_cpus_curve(name: str, precision: torch.dtype, within: float) -> None:
    ours, cpus = steps(name, DEVICE, STEPS, precision), steps(name, CPU, STEPS)
    assert ours["curve"] == pytest.approx(cpus["curve"], rel=within)


@pytest.mark.parametrize("below", [-1.0, 1.1], ids=["over all pairs", "over active pairs"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "gated", "jumprelu"])
def test_dense_and_sparse_sums_come_to_the_same(name: str, below: float) -> None:
    assert steps(name, DEVICE, 1, sparse_below=below)["curve"] == pytest.approx(
        steps(name, CPU, 1)["curve"], rel=1e-4
    )


def test_counts_of_more_than_256_tokens_are_exact_under_autocast() -> None:
    sae = build(recipe_of("vanilla"), torch.Generator().manual_seed(0)).to(DEVICE).train()
    hidden = Hidden(rows(1, 1).repeat(1, 8, 1).to(DEVICE), layers=(1,))
    with torch.autocast("cuda", torch.bfloat16):
        latents_of = sae(hidden).latents
    assert torch.equal(latents_of.active_counts, (latents_of.dense() > 0).sum(0))


def test_batches_reach_the_device_byte_for_byte(tiny_cache: Cache, int8_cache: Cache) -> None:
    for cache in (tiny_cache, int8_cache):
        selection = Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers)
        read: list[list[Any]] = []
        for device in (DEVICE, CPU):
            plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=600)
            with closing(load(selection, plans, 600, device)) as batches:
                read.append([[part.cpu().clone() for part in batch] for batch in batches])
        assert len(read[0]) == len(read[1]) > 3
        for ours, cpus in zip(*read, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, cpus, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_harvest_holds_a_cpus_hidden_states(
    dtype: str, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    caches = [
        harvest(tiny_settings(out=str(tmp_path / device), device=device, dtype=dtype)) for device in ("cuda", "cpu")
    ]
    assert caches[0].manifest.kept_tokens == caches[1].manifest.kept_tokens
    for ours, cpus in zip(*(cache.shards() for cache in caches), strict=True):
        for layer in caches[0].manifest.layers:
            a, b = (torch.from_numpy(shard.read(f"layer_{layer:02d}").copy()).float() for shard in (ours, cpus))
            assert (a - b).norm() / b.norm() < (2e-3 if dtype == "float16" else 2e-2)


def test_a_stopped_training_goes_on_bit_for_bit(
    settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        asked: dict[str, Any] = {"device": "cuda", "checkpoint_every_steps": 4}
        train(settings(**asked, out=str(tmp_path / "whole")))
        real = TopK.autoencode
        seen = 0

        def stopped(self: TopK, *arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == 7:
                raise KeyboardInterrupt
            return real(self, *arguments)

        monkeypatch.setattr(TopK, "autoencode", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(settings(**asked, out=str(tmp_path / "stopped")))
        train(settings(**asked, out=str(tmp_path / "stopped"), resume=True))
    finally:
        torch.use_deterministic_algorithms(False)
    ((whole,), (resumed,)) = ((tmp_path / of).glob("*/sae_weights.safetensors") for of in ("whole", "stopped"))
    ours, theirs = load_file(resumed), load_file(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scores_that_splice_the_lm_are_a_cpus(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    made = settings(device="cpu", epochs=2)
    train(made)
    found = []
    for device in ("cuda", "cpu"):
        asked = AnalyzeSettings(
            cache=made.cache,
            out=made.out,
            device=device,
            lm_dtype="float32",
            metrics=("NormMSE", "L0", "KLDiv", "Recovered"),
        )
        found.append(analyze(asked)["saes"][0])
    for name, value in found[1].items():
        if isinstance(value, float):
            assert found[0][name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("how", ["shard", "cpu_offload"])
def test_an_sae_divided_by_fsdp_among_one_is_the_same_bytes(
    how: str, settings: Callable[..., TrainSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --cpu-offload Adam runs on the CPU, so that these are the same to rounding."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(settings(device=str(DEVICE), out=str(tmp_path / "plain")))
        train(settings(device=str(DEVICE), out=str(tmp_path / "divided"), **{how: True}))
    finally:
        torch.use_deterministic_algorithms(False)
    ((plain,), (divided,)) = ((tmp_path / of).glob("*/sae_weights.safetensors") for of in ("plain", "divided"))
    ours, theirs = load_file(divided), load_file(plain)
    assert ours.keys() == theirs.keys()
    for name, of_plain in theirs.items():
        if how == "shard":
            assert torch.equal(ours[name], of_plain), name
        else:
            assert torch.allclose(ours[name], of_plain, rtol=1e-3, atol=1e-4), name


def test_contexts_and_clamped_text_are_a_cpus(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    """Contexts are of the strongest activations; where rounding makes two of them change places, of others."""
    made = settings(device="cpu", epochs=2)
    (result,) = train(made)
    found, said = [], []
    for device in (str(DEVICE), "cpu"):
        asked = ContextSettings(
            cache=made.cache, saes=(str(result.folder),), device=device, threshold=1.0, min_contexts=1, overwrite=True
        )
        contexts(asked)
        of_latents = read_contexts(result.folder).latents()
        found.append({one.summary.latent: {(c.row, c.position) for c in one.top} for one in of_latents})
        clamped = ClampSettings(
            sae=str(result.folder), prompt=("the router",), add=("3=6",), max_new_tokens=8, device=device
        )
        said.append([(text["original_ids"], text["clamped_ids"]) for text in clamp(clamped)["texts"]])
    ours, cpus = found
    assert ours.keys() == cpus.keys()
    alike = [len(ours[latent] & cpus[latent]) / max(1, len(cpus[latent])) for latent in cpus]
    assert sum(alike) / len(alike) > 0.95
    assert said[0] == said[1]


def test_latents_of_a_text_and_a_steered_continuation_are_a_cpus(
    settings: Callable[..., TrainSettings], tiny_model: Path
) -> None:
    made = settings(device="cpu", epochs=2)
    (result,) = train(made)
    shown, said = [], []
    for device in ("cuda", "cpu"):
        lm, sae = load_lm(str(tiny_model), device=device, lm_dtype="float32"), load_sae(result.folder, device=device)
        shown.append(str(latents(lm, sae, "the router reads a layer")))
        with steer(lm, sae, {3: 9.0}):
            said.append(lm.generate("the router"))
    assert shown[0] == shown[1]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", SAES)
def test_a_step_waits_for_the_device_nowhere_but_at_its_end(
    name: str, settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is, where it finds out which latents are dead; batches come on streams of their own."""
    from contextlib import ExitStack

    from routesae.train.run import pace_of, trainee_of

    assert 8 / 64 > 1 / 40  # of the latents, in all precisions: sums run over all pairs
    flags: dict[str, Any] = {"sae": name, "device": "cuda"}
    asked = settings(**flags)
    cache = Cache(asked.cache)
    (job,) = jobs_of(asked, cache)
    job.partial.mkdir(parents=True)
    selection = Selection(cache, 0, cache.manifest.train_rows, job.recipe.layers)
    with ExitStack() as stack:
        batches = stack.enter_context(
            closing(load(selection, epoch_plans(selection, seed=0, epoch=0, batch_tokens=1000), 1000, DEVICE))
        )
        trainee = trainee_of(job, asked, pace_of(selection, asked, DEVICE), DEVICE, stack)
        read = [Hidden(*(part.clone() for part in batch), layers=selection.layers) for batch in islice(batches, 3)]
        trainee.sae.initialise(read[0])
        trainee.step(1, read[1], 1000)
        trainee.dead_d = torch.arange(40, device=DEVICE)  # more than D/2
        monkeypatch.setattr(trainee, "_find_dead", lambda: None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainee.step(2, read[2], 1000)
        finally:
            torch.cuda.set_sync_debug_mode("default")
