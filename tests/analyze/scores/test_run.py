"""The stage analyze, end to end: what it scores, what it loads for that, and which LM it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae import __version__
from routesae.analyze.inputs.saes import cache_identity
from routesae.analyze.scores.metrics import CACHE_METRICS, LM_METRICS, METRICS
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput
from routesae.tests.shards import change_attributes
from routesae.train.run import TrainResult, train
from routesae.train.saes import SAES
from routesae.train.settings import settings_of

SMALL: dict[str, Any] = {"latents": 64, "k": 8, "batch_tokens": 1024, "lr": 1e-3, "device": "cpu"}
HEAVY = {"transformers", "datasets", "openai", "huggingface_hub"}


@pytest.fixture(scope="module")
def saes(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a topk of layer 3 and a hard routesae."""
    out = tmp_path_factory.mktemp("saes")
    trained(tiny_cache, out, sae="topk", layer=3, name="topk")
    trained(tiny_cache, out, name="routesae")
    return out


@pytest.fixture(scope="module")
def every_variant(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """All ten, trained in one pass: {variant: result}."""
    settings = {"sae": list(SAES), "cache": str(tiny_cache.path), "out": str(tmp_path_factory.mktemp("every"))}
    results = train(settings_of({**settings, **SMALL}))
    return dict(zip(SAES, results, strict=True))


def trained(cache: Cache, out: Path, **settings: Any) -> Path:
    """The folder of one SAE."""
    (result,) = train(settings_of({"cache": str(cache.path), "out": str(out), **settings, **SMALL}))
    return result.folder


def scores(cache: Cache, *metrics: str, **changes: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"metrics": metrics} if metrics else {}
    return analyze(AnalyzeSettings(cache=str(cache.path), device="cpu", **{**chosen, **changes}))


def held_out_tokens(cache: Cache) -> tuple[Tensor, Tensor]:
    """int64 [S, T] of the last 5 % of rows, and the bool [S, T] of what is neither special nor first."""
    rows = cache.manifest.rows
    first = rows - math.ceil(rows * 0.05)
    ids_ST = torch.from_numpy(np.array(cache.tokens()[first:])).long()
    kept_ST = (ids_ST != 0) & (ids_ST != 1)
    kept_ST[:, 0] = False
    return ids_ST, kept_ST


def held_out_hidden(cache: Cache, layer: int) -> Tensor:
    """float32 hidden_ND of the kept tokens of those rows, in the order of the disk."""
    _, kept_ST = held_out_tokens(cache)
    first = cache.manifest.rows - len(kept_ST)
    hidden = []
    for shard in cache.shards():
        rows = np.asarray(shard.read("order")) // cache.manifest.context + shard.record.rows[0]
        hidden.append(torch.from_numpy(np.asarray(shard.read(f"layer_{layer:02}"))[rows >= first]).float())
    hidden_ND = torch.cat(hidden)
    assert len(hidden_ND) == int(kept_ST.sum())
    return hidden_ND


def topk_by_hand(folder: Path, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised input and its reconstruction, in the LM's scale, from the weights on disk."""
    weights = load_file(folder / "sae_weights.safetensors")
    mean_N1, std_N1 = hidden_ND.mean(1, keepdim=True), hidden_ND.std(1, keepdim=True) + 1e-6
    x_ND = (hidden_ND - mean_N1) / std_N1
    z_NF = (x_ND - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kth_N1 = z_NF.sort(1, descending=True).values[:, 7:8]
    f_NF = torch.where(z_NF >= kth_N1, z_NF.clamp(min=0), 0)
    return x_ND, (f_NF @ weights["W_dec"] + weights["b_dec"]) * std_N1 + mean_N1


# ------------------------------------------------------------------------------------------------ what it scores


def test_default_metrics_are_those_of_the_cache() -> None:
    assert AnalyzeSettings().metrics == ("NormMSE", "FVU", "L0", "Dead", "Routing") == CACHE_METRICS
    assert LM_METRICS == ("KLDiv", "DeltaCE", "Recovered")


def test_every_sae_under_out_gets_one_row(tiny_cache: Cache, saes: Path) -> None:
    rows = scores(tiny_cache, "NormMSE", "L0", out=str(saes))["saes"]
    assert [(row["sae"], row["variant"], row["layers"]) for row in rows] == [
        ("routesae", "routesae", "2-5"),
        ("topk", "topk", "3"),
    ]
    assert [row["folder"] for row in rows] == [str(saes / "routesae"), str(saes / "topk")]


def test_half_written_saes_are_not_scored(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    shutil.copytree(saes / "topk", tmp_path / "topk")
    shutil.copytree(saes / "topk", tmp_path / ".other.partial")
    assert [row["sae"] for row in scores(tiny_cache, "L0", out=str(tmp_path))["saes"]] == ["topk"]


def test_named_saes_are_scored_in_the_order_given(tiny_cache: Cache, saes: Path) -> None:
    given = (str(saes / "topk"), str(saes / "routesae"))
    rows = scores(tiny_cache, "NormMSE", saes=given)["saes"]
    assert [row["sae"] for row in rows] == ["topk", "routesae"]
    alone = [scores(tiny_cache, "NormMSE", saes=(folder,))["saes"][0]["NormMSE"] for folder in given]
    assert [row["NormMSE"] for row in rows] == alone


def test_saes_of_the_same_name_are_told_apart(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    shutil.copytree(saes / "routesae", tmp_path / "topk")
    rows = scores(tiny_cache, "NormMSE", saes=(str(saes / "topk"), str(tmp_path / "topk")))["saes"]
    assert [(row["sae"], row["variant"]) for row in rows] == [
        (str(saes / "topk"), "topk"),
        (str(tmp_path / "topk"), "routesae"),
    ]


def test_an_sae_given_twice_is_no_crash(tiny_cache: Cache, saes: Path) -> None:
    rows = scores(tiny_cache, "NormMSE", saes=(str(saes / "topk"), str(saes / "topk")))["saes"]
    assert {row["folder"] for row in rows} == {str(saes / "topk")}


def test_only_the_metrics_asked_for_are_reported(tiny_cache: Cache, saes: Path) -> None:
    topk = str(saes / "topk")
    identity = {"sae", "folder", "variant", "layers", "latents", "intervals"}
    assert set(scores(tiny_cache, "NormMSE", "L0", saes=(topk,))["saes"][0]) - identity == {"NormMSE", "L0"}
    assert set(scores(tiny_cache, "KLDiv", saes=(topk,))["saes"][0]) - identity == {"KLDiv", "KLDiv_seq"}


def test_norm_mse_is_the_mean_over_held_out_tokens(tiny_cache: Cache, saes: Path) -> None:
    hidden_ND = held_out_hidden(tiny_cache, 3)
    x_ND, reconstruction_ND = topk_by_hand(saes / "topk", hidden_ND)
    std_N1 = hidden_ND.std(1, keepdim=True) + 1e-6
    errors_N = (((hidden_ND - reconstruction_ND) / std_N1) ** 2).sum(1) / (x_ND**2).sum(1)
    found = scores(tiny_cache, "NormMSE", saes=(str(saes / "topk"),))["saes"][0]["NormMSE"]
    assert found == pytest.approx(float(errors_N.mean()), abs=1e-5)


def test_kl_div_is_that_of_hooks_on_the_whole_model(tiny_cache: Cache, saes: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids_ST, kept_ST = held_out_tokens(tiny_cache)

    def splice(module: Any, inputs: Any, hidden_STD: Tensor) -> Tensor:
        changed_STD = hidden_STD.clone()
        changed_STD[kept_ST] = topk_by_hand(saes / "topk", hidden_STD[kept_ST])[1]
        return changed_STD

    with torch.no_grad():
        p_STV = torch.log_softmax(model(ids_ST).logits.double(), 2)
        handle = model.model.layers[2].register_forward_hook(splice)
        q_STV = torch.log_softmax(model(ids_ST).logits.double(), 2)
        handle.remove()
    expected = float((p_STV.exp() * (p_STV - q_STV)).sum(2).mean())
    row = scores(tiny_cache, "KLDiv", saes=(str(saes / "topk"),))["saes"][0]
    assert row["KLDiv"] == pytest.approx(expected, abs=1e-4)
    assert row["KLDiv_seq"] == pytest.approx(expected * tiny_cache.manifest.context, rel=1e-4)


def test_all_positions_give_the_published_codes_numbers(tiny_cache: Cache, saes: Path, tiny_model: Path) -> None:
    """2503.08200's hook_SAE replaces every position, special and first ones too, and its KLDiv is batchmean."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids_ST = held_out_tokens(tiny_cache)[0]
    losses, logits = {}, {}
    for name in ("clean", "spliced", "zero"):

        def splice(module: Any, inputs: Any, hidden_STD: Tensor, name: str = name) -> Tensor:
            if name == "clean":
                return hidden_STD
            whole_ND = hidden_STD.flatten(0, 1)
            new_ND = topk_by_hand(saes / "topk", whole_ND)[1] if name == "spliced" else torch.zeros_like(whole_ND)
            return new_ND.view_as(hidden_STD)

        handle = model.model.layers[2].register_forward_hook(splice)
        with torch.no_grad():
            logits[name] = model(ids_ST).logits
        handle.remove()
        losses[name] = float(F.cross_entropy(logits[name][:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten()))
    log_q_STV, p_STV = torch.log_softmax(logits["spliced"], 2), torch.softmax(logits["clean"], 2)
    expected = {
        "KLDiv_seq": float(F.kl_div(log_q_STV, p_STV, reduction="batchmean")),
        "DeltaCE": losses["spliced"] - losses["clean"],
        "Recovered": 1 - (losses["spliced"] - losses["clean"]) / (losses["zero"] - losses["clean"]),
    }
    asked = {"saes": (str(saes / "topk"),), "batch_sequences": 3}
    row = scores(tiny_cache, "KLDiv", "DeltaCE", "Recovered", all_positions=True, **asked)["saes"][0]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)
    kept = scores(tiny_cache, "KLDiv", **asked)["saes"][0]
    assert abs(kept["KLDiv_seq"] - row["KLDiv_seq"]) > 0.01


def test_an_sae_with_a_zero_decoder_row_has_finite_scores(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saes / "topk", tmp_path / "topk"))
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3] = 0
    weights["W_dec"][9] = 0
    save_file(weights, folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"].pop("routesae")  # a stranger's
    (folder / "cfg.json").write_text(json.dumps(config))
    names = (*CACHE_METRICS, *LM_METRICS)
    (row,) = scores(tiny_cache, *names, saes=(str(folder),))["saes"]
    numbers = [row[name] for metric in names for name in METRICS[metric].numbers if row[name] is not None]
    assert len(numbers) == 9
    assert all(math.isfinite(number) for number in numbers)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("variant", SAES)
def test_every_variant_gets_every_number(
    variant: str, tiny_cache: Cache, every_variant: dict[str, TrainResult], tmp_path: Path
) -> None:
    """Through the command line: those of the cache are what training ended with, those of the LM are finite."""
    result, file = every_variant[variant], tmp_path / "scores.json"
    metrics = [word for name in (*CACHE_METRICS, *LM_METRICS) for word in ("--metric", name)]
    arguments = ["analyze", *metrics, "--cache", str(tiny_cache.path), "--sae", str(result.folder)]
    run = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--json", str(file)])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(file.read_text())["saes"]
    assert row["variant"] == variant
    held_out = result.held_out
    assert held_out is not None
    expected = {"NormMSE": held_out.norm_mse, "FVU": held_out.fvu, "L0": held_out.l0, "Dead": held_out.dead}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < row["NormMSE"] < 1.5
    assert (row["Shares"] is not None) == (variant == "routesae")
    assert row["KLDiv"] > 0
    assert row["KLDiv_seq"] == pytest.approx(row["KLDiv"] * tiny_cache.manifest.context)
    assert all(math.isfinite(row[name]) for name in ("DeltaCE", "CE_clean", "Recovered"))
    by_row = [metric for metric in METRICS.values() if metric.by_row and metric.drawn == "rows"]
    numbers = {name for metric in by_row for name in metric.numbers} - {"Shares"}
    assert set(row["intervals"]) == {name for name in numbers if row[name] is not None}
    for name, (low, high) in row["intervals"].items():
        assert low <= row[name] <= high or abs(high - low) < 1e-6, name


def lens_sae(architecture: str, normalize: str, folder: Path) -> Any:
    """An SAE of random weights that SAELens made, and saved into `folder`, of what routesae calls layer 3."""
    import sae_lens

    kinds = {"standard": "Standard", "gated": "Gated", "topk": "TopK", "jumprelu": "JumpReLU"}
    config_of = getattr(sae_lens, f"{kinds[architecture]}SAEConfig")
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="tiny", hook_name="blocks.2.hook_resid_post")
    own = {"k": 8} if architecture == "topk" else {}
    config = config_of(d_in=32, d_sae=64, normalize_activations=normalize, metadata=metadata, **own)
    sae = getattr(sae_lens, f"{kinds[architecture]}SAE")(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(0, 0.2)
            if name == "threshold":
                parameter.abs_()
    sae.save_model(folder)
    return sae.requires_grad_(False).eval()


@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_saes_of_saelens_making_score_as_saelens_reconstructs(
    architecture: str, normalize: str, tiny_cache: Cache, tmp_path: Path
) -> None:
    pytest.importorskip("sae_lens")
    theirs = lens_sae(architecture, normalize, tmp_path)
    (row,) = scores(tiny_cache, "NormMSE", "L0", "KLDiv", "Recovered", saes=(str(tmp_path),))["saes"]
    hidden_ND = held_out_hidden(tiny_cache, 3)
    f_NF = theirs.encode(hidden_ND)
    errors_ND, x_ND = hidden_ND - theirs.decode(f_NF), hidden_ND
    if normalize == "layer_norm":
        std_N1 = hidden_ND.std(1, keepdim=True)
        errors_ND, x_ND = errors_ND / std_N1, (hidden_ND - hidden_ND.mean(1, keepdim=True)) / std_N1
    expected = float((errors_ND.square().sum(1) / x_ND.square().sum(1)).mean())
    assert row["layers"] == "3"
    assert row["NormMSE"] == pytest.approx(expected, rel=1e-3)
    assert row["L0"] == pytest.approx(float((f_NF > 0).sum(1).double().mean()), rel=1e-3)
    assert row["KLDiv"] > 0
    assert math.isfinite(row["Recovered"])


def test_held_out_rows_are_scored_by_default(tiny_cache: Cache, saes: Path) -> None:
    result = scores(tiny_cache, "NormMSE", out=str(saes))
    rows, held_out = tiny_cache.manifest.rows, len(held_out_tokens(tiny_cache)[0])
    assert result["rows_scored"] == [rows - held_out, rows]
    assert result["tokens_scored"] == held_out * tiny_cache.manifest.context


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (16, 1), (47, 2), (48, 3), (10**9, None)])
def test_tokens_bounds_the_rows_scored(tiny_cache: Cache, saes: Path, tokens: int, rows: int | None) -> None:
    result = scores(tiny_cache, "L0", out=str(saes), tokens=tokens)
    every = len(held_out_tokens(tiny_cache)[0])
    first, after = result["rows_scored"]
    assert (first, after - first) == (tiny_cache.manifest.rows - every, rows or every)


def test_fewer_tokens_bound_the_lm_metrics_too(tiny_cache: Cache, saes: Path) -> None:
    from routesae.reporting import Progress

    seen: list[Progress] = []
    analyze(
        AnalyzeSettings(
            cache=str(tiny_cache.path), saes=(str(saes / "topk"),), metrics=("KLDiv",), tokens=48, device="cpu"
        ),
        seen.append,
    )
    assert [(progress.done, progress.total) for progress in seen] == [(48, 48)]


def test_result_says_what_it_was_computed_from(tiny_cache: Cache, saes: Path) -> None:
    result = json.loads(json.dumps(scores(tiny_cache, "NormMSE", "Routing", out=str(saes), tokens=64)))
    assert result["routesae"] == __version__
    assert result["settings"]["metrics"] == ["NormMSE", "Routing"]
    assert result["settings"]["tokens"] == 64
    assert result["cache"]["path"] == str(tiny_cache.path.resolve())
    assert result["cache"]["model"] == tiny_cache.manifest.model
    assert result["cache"]["corpus_fingerprint"] == tiny_cache.manifest.corpus_fingerprint
    assert result["cache"]["lm_weights"] == tiny_cache.manifest.weights_hash
    assert {"python", "torch", "transformers", "numpy"} < set(result["versions"])
    topk = result["identities"]["topk"]
    weights = saes / "topk" / "sae_weights.safetensors"
    assert topk["weights"] == {weights.name: xxhash.xxh3_128(weights.read_bytes()).hexdigest()}
    assert (topk["recipe"]["sae"], topk["recipe"]["k"]) == ("topk", 8)
    shares = result["saes"][0]["Shares"]
    assert set(shares) == {"2", "3", "4", "5"}
    assert sum(shares.values()) == pytest.approx(1)
    assert result["saes"][1]["Shares"] is None


def test_the_seed_fixes_the_intervals_and_moves_no_score(tiny_cache: Cache, saes: Path) -> None:
    first, again, other = (scores(tiny_cache, "NormMSE", out=str(saes), seed=seed)["saes"] for seed in (0, 0, 1))
    assert first == again
    assert [row["NormMSE"] for row in first] == [row["NormMSE"] for row in other]
    assert [row["intervals"] for row in first] != [row["intervals"] for row in other]


def test_one_row_has_no_intervals(tiny_cache: Cache, saes: Path) -> None:
    for row in scores(tiny_cache, "NormMSE", "KLDiv", out=str(saes), tokens=1)["saes"]:
        assert row["intervals"] == {}


def test_the_fingerprint_of_a_cache_changes_with_its_hidden_states(tiny_cache: Cache, tmp_path: Path) -> None:
    copied = Cache(shutil.copytree(tiny_cache.path, tmp_path / "shards"))
    assert cache_identity(copied)["fingerprint"] == cache_identity(tiny_cache)["fingerprint"]
    hashes = {**copied.shard(1).record.hashes, "layer_03": "0" * 16}  # as other hidden states would have it
    change_attributes(copied.folder / "shard-00001", hashes=hashes)
    assert cache_identity(copied)["fingerprint"] != cache_identity(tiny_cache)["fingerprint"]


def test_soft_routing_is_scored_on_the_cache_and_refused_for_the_lm(tiny_cache: Cache, tmp_path: Path) -> None:
    trained(tiny_cache, tmp_path, routing="soft", name="soft")
    row = scores(tiny_cache, "NormMSE", out=str(tmp_path))["saes"][0]
    assert 0 < row["NormMSE"] < 1.5
    for metric in LM_METRICS:
        with pytest.raises(WrongInput, match="soft routing"):
            scores(tiny_cache, metric, out=str(tmp_path))


def test_a_soft_routesae_does_not_keep_the_others_from_the_lm(
    tiny_cache: Cache, saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = (str(trained(tiny_cache, tmp_path, routing="soft", name="soft")), str(saes / "topk"))
    soft, topk = scores(tiny_cache, "L0", "KLDiv", saes=given)["saes"]
    assert "KLDiv" not in soft
    assert "L0" in soft
    assert topk["KLDiv"] == scores(tiny_cache, "KLDiv", saes=given[1:])["saes"][0]["KLDiv"]
    assert any("soft" in record.message for record in caplog.records if record.levelname == "WARNING")


# ------------------------------------------------------------------------------------------------- which LM


def test_the_same_model_elsewhere_is_taken(tiny_cache: Cache, saes: Path, tiny_model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    topk = (str(saes / "topk"),)
    there = scores(tiny_cache, "KLDiv", saes=topk, model=str(moved))["saes"][0]["KLDiv"]
    assert there == scores(tiny_cache, "KLDiv", saes=topk)["saes"][0]["KLDiv"]


@pytest.mark.parametrize("differing", ["config", "tokenizer", "weights"])
def test_a_different_model_is_refused_naming_what_differs(
    tiny_cache: Cache, saes: Path, tiny_model: Path, tmp_path: Path, differing: str
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    {"config": _other_config, "tokenizer": _other_tokenizer, "weights": _fine_tuned}[differing](other)
    with pytest.raises(WrongInput, match=rf"is not the LM of the cache .*: its {differing} differ") as refused:
        scores(tiny_cache, "KLDiv", saes=(str(saes / "topk"),), model=str(other))
    assert str(other) in str(refused.value)
    assert str(tiny_model) in str(refused.value)


def _other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))


def _other_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)


def _fine_tuned(folder: Path) -> None:
    """One step of gradient descent, as a fine-tune would take it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2, 34)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ what it loads


def imported_by(*arguments: str, cwd: Path) -> set[str]:
    """Top-level packages that `routesae …` imports, by python -X importtime in a process of its own."""
    command = [sys.executable, "-X", "importtime", "-m", "routesae", *arguments]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", run.stderr, re.MULTILINE)}


def test_metrics_of_the_cache_import_no_language_model_library(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    metrics = [argument for metric in CACHE_METRICS for argument in ("--metric", metric)]
    imported = imported_by("analyze", *metrics, "--cache", str(tiny_cache.path), "--out", str(saes), cwd=tmp_path)
    assert {"routesae", "torch"} <= imported  # or the parse proves nothing
    assert imported & HEAVY == set()


def test_train_imports_no_language_model_library(tiny_cache: Cache, tmp_path: Path) -> None:
    small = ["--latents", "64", "--k", "8", "--device", "cpu"]
    imported = imported_by("train", "--cache", str(tiny_cache.path), *small, cwd=tmp_path)
    assert {"routesae", "torch"} <= imported
    assert imported & HEAVY == set()
    assert (tmp_path / "saes" / "routesae_hard_64_k8" / "cfg.json").exists()


@pytest.mark.parametrize("metric", ["NormMSE", "KLDiv"])
def test_a_cache_without_its_shards_is_refused_for_every_metric(
    metric: str, tiny_cache: Cache, saes: Path, tmp_path: Path
) -> None:
    """KLDiv reads rows of tokens only; without a shard nothing would say which LM wrote them."""
    shutil.copytree(tiny_cache.path, tmp_path / "shards", ignore=shutil.ignore_patterns("shard-*"))
    with pytest.raises(WrongInput, match=r"lacks 5 of its 5 shards .*harvest again"):
        scores(Cache(tmp_path / "shards"), metric, out=str(saes))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"label": "topic"}, "--label topic is for Probe; add --metric Probe or leave it out"),
        ({"all_positions": True, "metrics": ("L0",)}, "--all-positions is for KLDiv, DeltaCE, Recovered; add one"),
    ],
)
def test_a_setting_that_no_asked_metric_reads_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(WrongInput, match=line):
        AnalyzeSettings(**settings)
    AnalyzeSettings(**settings | {"metrics": ("L0", "Probe", "KLDiv")})
