"""The stage harvest, end to end on a tiny model: what it keeps, resumes, refuses and survives."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import Manifest, layer_name
from routesae.harvest.cache.quantise import encoded, row_statistics
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import verify
from routesae.harvest.filling.buffer import ShardBuffer, Staging
from routesae.harvest.filling.output import Output
from routesae.harvest.lm.model import LanguageModel, load_lm, weights_hash
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings, layer_list, parse_layers
from routesae.reporting import FailedRun, Progress, WrongInput
from routesae.tests.processes import Command
from routesae.tests.shards import change_attributes

Array = npt.NDArray[Any]
Settings = Callable[..., HarvestSettings]
LARGEST = 65504.0  # of float16


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole_lm_hidden(model: Path, cache: Cache, layer: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """float32 [S·T, D] of a one-shard cache's tokens, by the plainest forward pass of the same batch shape."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype).eval()
    rows = torch.from_numpy(np.array(cache.tokens())).long()
    with torch.no_grad():
        batches = [
            lm(rows[i : i + 8], output_hidden_states=True).hidden_states[layer] for i in range(0, len(rows), 8)
        ]
    return torch.cat(batches).flatten(0, 1).float()


def changed_model(folder: Path, to: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a model folder with weights changed in place by `change`."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, to, dirs_exist_ok=True)
    lm = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        change(lm)
    lm.save_pretrained(to)
    return to


# ---------------------------------------------------------------------------------------------- what is kept


def test_a_finished_harvest_is_whole(tiny_cache: Cache) -> None:
    assert tiny_cache.missing() == []
    assert verify(str(tiny_cache.path)).problems == []
    assert sum(shard.record.kept for shard in tiny_cache.shards()) == tiny_cache.manifest.kept_tokens


def kept_naively(cache: Cache, dropped: tuple[int, ...], skip: int) -> list[int]:
    flat, context = cache.tokens().ravel().tolist(), cache.manifest.context
    return [i for i, token in enumerate(flat) if token not in dropped and i % context >= skip]


@pytest.mark.parametrize(
    ("changes", "dropped", "skip"),
    [
        ({}, (0, 1), 1),
        ({"skip_positions": 0}, (0, 1), 0),
        ({"skip_positions": 5}, (0, 1), 5),
        ({"keep_special": True}, (), 1),
        ({"keep_special": True, "skip_positions": 0}, (), 0),
    ],
)
def test_kept_are_the_positions_asked_for(
    changes: dict[str, Any],
    dropped: tuple[int, ...],
    skip: int,
    tiny_model: Path,
    tiny_settings: Settings,
    tmp_path: Path,
) -> None:
    cache = harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=1024, layers="3", **changes))
    assert 1 in cache.tokens()
    order = cache.shard(0).read("order")
    assert sorted(order.tolist()) == kept_naively(cache, dropped, skip)
    assert cache.manifest.kept_tokens == len(order)
    expected = whole_lm_hidden(tiny_model, cache, 3).numpy().astype(np.float16)[order]
    assert np.array_equal(cache.shard(0).read("layer_03"), expected)


def test_float32_keeps_the_lms_own_numbers(tiny_model: Path, tiny_settings: Settings, tmp_path: Path) -> None:
    cache = harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=512, dtype="float32"))
    for layer in (2, 5):
        stored = cache.shard(0).read(layer_name(layer))
        expected = whole_lm_hidden(tiny_model, cache, layer).numpy()[cache.shard(0).read("order")]
        assert stored.dtype == np.float32
        assert np.array_equal(stored, expected)


def test_a_shard_with_nothing_to_keep_is_whole(tiny_settings: Settings, tmp_path: Path) -> None:
    data, text = tmp_path / "empty.jsonl", json.dumps({"text": "the router reads the shard " * 9})
    data.write_text('{"text": ""}\n' * 34 + text)
    sizes = {"min_chars": 0, "tokens": 64, "shard_tokens": 32}
    cache = harvest(tiny_settings(data=str(data), out=str(tmp_path / "shards"), **sizes))
    assert cache.shard(1).read("layer_02").size > 0
    assert cache.shard(0).read("layer_02").shape == (0, 32)
    assert verify(str(cache.path)).problems == []


def test_a_corpus_shorter_than_asked_is_used_whole_with_a_warning(
    tiny_settings: Settings, tiny_corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = tiny_corpus.read_text().splitlines()[:6]
    (tmp_path / "six.jsonl").write_text("\n".join([*documents, '{"text": "short"}']))
    cache = harvest(tiny_settings(data=str(tmp_path / "six.jsonl"), out=str(tmp_path / "shards"), layers="2"))
    assert cache.manifest.tokens_asked == 9000
    assert (cache.manifest.documents, cache.manifest.documents_short, cache.missing()) == (6, 1, [])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{cache.manifest.rows * 16:,} tokens, not the 9,000 asked for" in warning


def test_progress_counts_every_token_once(tiny_settings: Settings, tmp_path: Path) -> None:
    seen: list[Progress] = []
    harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=2560, layers="2"), seen.append)
    tokenised = [now for now in seen if now.stage == "tokenise"]
    harvested = [now.done for now in seen if now.stage == "harvest"]
    assert (tokenised[-1].done, tokenised[-1].total, tokenised[-1].unit) == (2560, 2560, "tokens")
    assert harvested == [128 * i for i in range(1, 21)]
    assert seen[-1].total == 2560
    assert seen[-1].facts["size"].endswith("kB")


# ------------------------------------------------------------------------------------------------- resuming


def test_a_resumed_harvest_writes_just_the_missing_shards_and_bitwise_the_same(
    begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    shutil.rmtree(begun / "shard-00001")
    shutil.rmtree(begun / "shard-00004")
    (begun / ".shard-00001.partial" / "order").mkdir(parents=True)
    inodes = {path: path.stat().st_ino for path in begun.rglob("*") if ".shard" not in str(path)}
    seen: list[Progress] = []
    harvest(tiny_settings(out=str(begun)), seen.append)
    assert contents(begun) == contents(tiny_cache.path)
    assert not list(begun.glob(".*"))
    assert all(path.stat().st_ino == inode for path, inode in inodes.items())
    assert {now.stage for now in seen} == {"harvest"}  # the corpus is not read again
    assert (seen[-1].done, seen[-1].total) == ((128 + 50) * 16, (128 + 50) * 16)


def test_shards_do_not_depend_on_which_were_there_before(
    begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    for index in range(4):
        shutil.rmtree(begun / f"shard-0000{index}")
    harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == contents(tiny_cache.path)


def test_a_finished_harvest_given_again_changes_nothing(begun: Path, tiny_settings: Settings) -> None:
    times = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    harvest(tiny_settings(out=str(begun)))
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == times


def test_a_harvest_stopped_between_the_tokens_and_the_manifest_goes_on(
    begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    for path in begun.glob("shard-*"):
        shutil.rmtree(path)
    staged = begun / ".tokens.12ab.partial" / "tokens"
    staged.mkdir(parents=True)
    (begun / "zarr.json").rename(staged / "zarr.json")
    harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == contents(tiny_cache.path)


def test_a_harvest_stopped_while_tokenising_begins_again(
    begun: Path, tiny_cache: Cache, tiny_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (begun / "tokens").rename(tmp_path / "new" / ".tokens.12ab.partial")
    harvest(tiny_settings(out=str(tmp_path / "new")))
    assert contents(tmp_path / "new") == contents(tiny_cache.path)


OTHER_SETTINGS = [
    ({"seed": 1}, "seed is 0, not 1"),
    ({"layers": "2-4"}, "layers is (2, 3, 4, 5), not (2, 3, 4)"),
    ({"dtype": "float32"}, "dtype is float16, not float32"),
    ({"overflow": "clip"}, "overflow is error, not clip"),
    ({"context": 32}, "context is 16, not 32"),
    ({"tokens": 8000}, "tokens"),
    ({"shard_tokens": 1024}, "rows of a shard (--shard-tokens / --context) is 128, not 64"),
    ({"skip_positions": 0}, "skip_positions is 1, not 0"),
    ({"keep_special": True}, "keep_special is False, not True"),
    ({"min_chars": 50}, "min_chars is 100, not 50"),
    ({"text_field": "body"}, "text_field is text, not body"),
    ({"split": "test"}, "split is train, not test"),
    ({"data_config": "en"}, "data_config is None, not en"),
    ({"lm_dtype": "bfloat16"}, "lm_dtype is float32, not bfloat16"),
    ({"data": "elsewhere.jsonl"}, "not elsewhere.jsonl"),
]


@pytest.mark.parametrize(("changes", "named"), OTHER_SETTINGS, ids=[next(iter(c)) for c, _ in OTHER_SETTINGS])
def test_other_settings_into_the_same_folder_are_refused_by_name(
    changes: dict[str, Any], named: str, begun: Path, tiny_settings: Settings
) -> None:
    shutil.rmtree(begun / "shard-00004")
    before = contents(begun)
    with pytest.raises(WrongInput, match="begun with other settings") as error:
        harvest(tiny_settings(out=str(begun), **changes))
    assert named in str(error.value)
    assert str(error.value).count(" is ") == (2 if "context" in changes else 1)  # only what differs, rows a shard too
    assert contents(begun) == before


def test_how_the_work_is_batched_is_no_reason_to_refuse(begun: Path, tiny_settings: Settings) -> None:
    shutil.rmtree(begun / "shard-00004")
    cache = harvest(tiny_settings(out=str(begun), batch_sequences=3))
    assert [cache.shard(index).record.batch_sequences for index in (3, 4)] == [8, 3]


def test_another_model_in_the_same_place_is_refused(
    tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    model = changed_model(tiny_model, tmp_path / "model", lambda lm: None)
    settings = tiny_settings(model=str(model), out=str(tmp_path / "shards"), tokens=4096, layers="2-3")
    harvest(settings)
    shutil.rmtree(tmp_path / "shards" / "shard-00001")
    before = contents(tmp_path / "shards")
    changed_model(tiny_model, model, lambda lm: lm.model.layers[1].mlp.up_proj.weight.mul_(1.1))
    with pytest.raises(WrongInput, match="other weights"):
        harvest(settings)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(WrongInput, match="config_hash is"):
        harvest(settings)
    assert contents(tmp_path / "shards") == before


def test_a_harvest_killed_at_any_moment_resumes_to_the_same_bytes(
    tiny_cache: Cache, tiny_model: Path, tiny_corpus: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    moments: list[Callable[[Path], bool]] = [
        lambda out: any(out.glob(".shard-*.partial")),
        lambda out: (out / "shard-00000").exists(),
        lambda out: (out / "shard-00001").exists() and any(out.glob(".shard-*.partial")),
    ]
    command = ["harvest", "--model", str(tiny_model), "--data", str(tiny_corpus)]
    command += ["--tokens", "9000", "--context", "16", "--shard-tokens", "2048", "--layers", "2-5", "--device", "cpu"]
    command += ["--lm-dtype", "float32"]
    outs = [tmp_path / f"shards-{i}" for i in range(len(moments))]
    running = {out: Command(*command, "--out", out, cwd=tmp_path) for out in outs}
    try:
        while running:
            for out, moment in zip(outs, moments, strict=True):
                if out in running and (moment(out) or running[out].poll() is not None):
                    running[out].kill()
                    running.pop(out).wait()
            time.sleep(0.0005)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert any(Cache(out).missing() for out in outs)
    for out in outs:
        cache = Cache(out)
        problems = verify(str(out)).problems
        assert problems == [f"shard-0000{index}: missing" for index in cache.missing()]
        for shard in cache.shards():  # what a reader sees is whole and right
            expected = tiny_cache.shard(shard.record.index)
            assert all(
                np.array_equal(shard.read(name), expected.read(name)) for name in ("order", "layer_02", "layer_05")
            )
        harvest(tiny_settings(out=str(out)))
        assert contents(out) == contents(tiny_cache.path)


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "shard-00000/notes.txt", "tokens/notes.txt"])
def test_a_folder_of_other_things_is_refused_and_untouched(
    name: str, tiny_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("precious")
    with pytest.raises(WrongInput, match=r"--out .*mine exists and is not a routesae cache"):
        harvest(tiny_settings(out=str(tmp_path / "mine")))
    assert contents(tmp_path / "mine") == {name: b"precious"}
    with pytest.raises(WrongInput, match="--out"):
        harvest(tiny_settings(out=str(tmp_path / "mine" / name)))
    assert contents(tmp_path / "mine") == {name: b"precious"}


def test_an_empty_folder_and_a_deep_new_one_are_taken(tiny_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert harvest(tiny_settings(out=str(out), tokens=256, layers="1")).missing() == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no document to use"),
        (["short"] * 3, "has no document to use; 3 were empty or shorter than --min-chars 100"),
        (["model " * 20], "too small for one row of 64 tokens.*--context"),
    ],
)
def test_a_corpus_of_too_little_is_wrong_input_and_leaves_nothing(
    lines: list[str], message: str, tiny_settings: Settings, tmp_path: Path
) -> None:
    corpus = tmp_path / "little.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    settings = tiny_settings(data=str(corpus), out=str(tmp_path / "shards"), context=64)
    with pytest.raises(WrongInput, match=message):
        harvest(settings)
    assert not (tmp_path / "shards").exists()


def test_too_many_malformed_documents_stop_a_run_that_needs_only_the_first_of_them(
    tiny_settings: Settings, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "half.jsonl"
    corpus.write_text("".join(line + "\n{\n" for line in tiny_corpus.read_text().splitlines() * 4))
    with pytest.raises(FailedRun, match=f"malformed.*{corpus}:2"):
        harvest(tiny_settings(data=str(corpus), out=str(tmp_path / "shards"), tokens=2048))
    assert not (tmp_path / "shards").exists()


def test_a_context_longer_than_the_models_is_wrong_input(tiny_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="--context 128 is more than the 64 positions"):
        harvest(tiny_settings(context=128, out=str(tmp_path / "shards")))
    assert not (tmp_path / "shards").exists()


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))


def test_a_disk_too_small_is_refused_with_sizes_and_leaves_no_cache(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    disk_of(monkeypatch, 1_500_000)
    with pytest.raises(WrongInput, match=r"need 2\.4 MB, but .* has 1\.5 MB free.*--tokens.*--layers.*--out"):
        harvest(tiny_settings(out=str(out)))
    assert not out.exists()
    assert harvest(tiny_settings(out=str(out), tokens=4000)).missing() == []


@pytest.mark.parametrize("present", [0, 3])
def test_a_resume_asks_for_the_disk_that_the_missing_shards_need(
    present: int, begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(present, 5):
        shutil.rmtree(begun / f"shard-0000{index}")
    before = contents(begun)
    disk_of(monkeypatch, 500_000)
    with pytest.raises(WrongInput, match=r"has 500\.0 kB free"):
        harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == before


def test_what_the_run_takes_on_disk_is_said_before_it_starts(
    tiny_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "routesae")

    def started(now: Progress) -> None:
        if now.stage == "harvest":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=8000), started)
    assert "288 B a token, up to 2.3 MB for 8,000 tokens" in caplog.text
    assert re.search(r"the shards will take 2\.2 MB; .* is free", caplog.text)


# ------------------------------------------------------------------------------- values that do not fit


@pytest.fixture(scope="module")
def loud_model(tiny_model: Path, tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model with one token whose hidden states exceed float16, and that token, the commonest plain one."""
    flat = tiny_cache.tokens().ravel()
    token = int(np.bincount(flat[flat > 1]).argmax())
    folder = tmp_path_factory.mktemp("loud")
    changed_model(tiny_model, folder, lambda lm: lm.model.embed_tokens.weight[token].mul_(3e5))
    return folder, token


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_overflow_names_layer_document_and_remedy_and_leaves_no_bad_shard(
    dtype: str, loud_model: tuple[Path, int], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings(model=str(loud_model[0]), out=str(tmp_path / "shards"), tokens=2048, layers="3,5")
    with pytest.raises(FailedRun, match=r"fit float16 \(at.*--overflow clip.*--dtype float32") as error:
        harvest(settings.replace(dtype=dtype))
    cache = Cache(tmp_path / "shards")
    assert cache.missing() == [0]
    found = re.search(r"layer (\d+), document (\d+), row (\d+), position (\d+)", str(error.value))
    assert found is not None
    layer, document, row, position = map(int, found.groups())
    flat = row * 16 + position
    assert layer == 3
    assert cache.tokens()[row, position] == loud_model[1]
    assert document == 1 + cache.tokens().ravel()[:flat].tolist().count(1)  # an EOS ends each
    hidden = whole_lm_hidden(loud_model[0], cache, 3)
    kept = kept_naively(cache, (0, 1), 1)
    over = hidden[kept].abs() > LARGEST
    assert hidden[flat].abs().max() > LARGEST
    assert f"up to {hidden[kept].abs().max():,.0f} in {int(over.any(1).sum())} tokens" in str(error.value)


@pytest.mark.parametrize("lm_dtype", ["float32", "bfloat16"])
def test_overflow_clip_cuts_and_counts_just_what_does_not_fit(
    lm_dtype: str, loud_model: tuple[Path, int], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings(
        model=str(loud_model[0]), out=str(tmp_path / "shards"), tokens=2048, layers="3,5", overflow="clip"
    )
    cache = harvest(settings.replace(lm_dtype=lm_dtype))
    order = cache.shard(0).read("order").tolist()
    for layer in (3, 5):
        hidden = whole_lm_hidden(loud_model[0], cache, layer, getattr(torch, lm_dtype))[order]
        stored = cache.shard(0).read(layer_name(layer))
        assert np.isfinite(stored).all()
        assert np.array_equal(stored, hidden.clamp(-LARGEST, LARGEST).numpy().astype(np.float16))
        found = cache.shard(0).record.statistics[str(layer)]
        assert found.clipped == int((hidden.abs() > LARGEST).sum()) > 0
        assert found.max_abs == hidden.abs().max()


def test_int8_is_made_of_the_clipped_values(
    loud_model: tuple[Path, int], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings(
        model=str(loud_model[0]), out=str(tmp_path / "shards"), tokens=2048, layers="3", overflow="clip", dtype="int8"
    )
    cache = harvest(settings)
    order = np.array(cache.shard(0).read("order"))
    clipped = whole_lm_hidden(loud_model[0], cache, 3)[order].clamp(-LARGEST, LARGEST).half()
    expected, encoding = encoded(clipped, row_statistics(clipped)[1])
    assert np.array_equal(cache.shard(0).read("layer_03"), expected.numpy())
    assert np.isfinite(cache.shard(0).read("token_std")).all()
    assert cache.shard(0).record.statistics["3"].int8_fvu == float(encoding.fvu)


def test_float32_holds_what_overflows_float16(
    loud_model: tuple[Path, int], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings(model=str(loud_model[0]), out=str(tmp_path / "shards"), tokens=1024, layers="3")
    cache = harvest(settings.replace(dtype="float32"))
    expected = whole_lm_hidden(loud_model[0], cache, 3).numpy()[cache.shard(0).read("order")]
    assert np.abs(expected).max() > LARGEST
    assert np.array_equal(cache.shard(0).read("layer_03"), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("overflow", ["error", "clip"])
def test_a_model_that_puts_out_nan_stops_the_run(
    overflow: str, dtype: str, tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    def spoil(lm: Any) -> None:
        lm.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")

    model = changed_model(tiny_model, tmp_path / "model", lambda lm: None)
    out = tmp_path / "shards"
    settings = tiny_settings(model=str(model), out=str(out), tokens=1024, overflow=overflow, dtype=dtype)
    harvest(settings)
    shutil.rmtree(out / "shard-00000")
    changed_model(tiny_model, tmp_path / "model", spoil)  # after its proof, as a rare token may do
    spoiled = load_lm(str(model), device=torch.device("cpu"), lm_dtype="float32")
    change_attributes(out, exact_weights_hash=weights_hash(spoiled, exact=True))
    with pytest.raises(FailedRun, match=r"NaN or infinite.*layer 4, document .*--lm-dtype float32"):
        harvest(settings)
    assert Cache(tmp_path / "shards").missing() == [0]


class Constant(nn.Module):
    """An LM whose six blocks put out one number at every place."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(6))

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        hidden_BTD = torch.full((*input_ids.shape, 32), self.value)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "overflow", "stored"),
    [
        (65504.0, "error", 65504.0),
        (65504.0, "clip", 65504.0),
        (65510.0, "error", None),  # more than float16's largest, yet rounded to it by a cast
        (65519.0, "clip", 65504.0),
        (65520.0, "error", None),
        (65520.0, "clip", 65504.0),
        (float("inf"), "clip", None),
        (float("inf"), "error", None),
    ],
)
def test_values_at_the_edge_of_float16(
    value: float, overflow: str, stored: float | None, sign: int, begun: Path
) -> None:
    shutil.rmtree(begun / "shard-00000")
    cache, model = Cache(begun), Constant(sign * value)
    manifest = Manifest(**{**cache.manifest.to_dict(), "overflow": overflow})
    staging = Staging(manifest, torch.device("cpu"))
    buffer = ShardBuffer(np.array(cache.tokens()[:128]), cache.kept(0, 128), manifest, 0, staging)
    buffer.fill(LanguageModel(model, model.blocks, 32, torch.device("cpu")), 8, lambda rows: None)
    if stored is None:
        with pytest.raises(FailedRun, match="layer 2, document"):
            buffer.commit(cache, 8)
        assert not cache.has_shard(0)
    else:
        record = buffer.commit(cache, 8)
        assert (cache.shard(0).read("layer_05") == sign * stored).all()
        assert record.statistics["5"].clipped == (0 if value <= LARGEST else record.kept * 32)


# ------------------------------------------------------------------------------------------------ settings


def test_layers_that_are_not_a_range_are_not_shown_as_one() -> None:
    assert [layer_list(layers) for layers in ((9, 15), (4, 5, 6, 12), (3,), (3, 4))] == ["9,15", "4-6,12", "3", "3-4"]


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        (None, 16, tuple(range(4, 13))),
        (None, 30, tuple(range(7, 23))),
        (None, 6, (1, 2, 3, 4)),
        (None, 3, (1, 2)),
        (None, 2, (1,)),
        (None, 1, (1,)),
        ("4-12", 16, tuple(range(4, 13))),
        ("4,8,12", 16, (4, 8, 12)),
        (" 12, 4-6 ,5", 16, (4, 5, 6, 12)),
        ("1-16", 16, tuple(range(1, 17))),
        ("7", 16, (7,)),
        ("7-7", 16, (7,)),
    ],
)
def test_layers_are_ranges_lists_or_the_middle_half(
    layers: str | None, depth: int, expected: tuple[int, ...]
) -> None:
    assert parse_layers(layers, depth) == expected
    assert parse_layers(layer_list(expected), depth) == expected


@pytest.mark.parametrize(
    "layers",
    ["", ",", "4,", "a", "4-", "-4", "4-b", "12-4", "0", "0-3", "17", "4-17", "20-30", "1.5", "4--8", "4-6-8"],
)
def test_layers_that_make_no_sense_are_wrong_input(layers: str) -> None:
    with pytest.raises(WrongInput, match="--layers") as error:
        parse_layers(layers, 16)
    assert repr(layers) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 0),
        ("tokens", 511),
        ("context", 1),
        ("shard_tokens", 0),
        ("min_chars", -1),
        ("seed", -1),
        ("batch_sequences", 0),
        ("skip_positions", -1),
        ("skip_positions", 512),
        ("dtype", "bfloat16"),
        ("overflow", "wrap"),
    ],
)
def test_impossible_settings_are_wrong_input_naming_option_and_value(name: str, value: object) -> None:
    with pytest.raises(WrongInput) as error:
        HarvestSettings(**{name: value})
    assert f"--{name.replace('_', '-')}" in str(error.value)
    assert str(value) in str(error.value)


# ------------------------------------------------------------------------- what others do to the folder meanwhile


def once(do: Callable[[], object], at: int) -> Callable[[Progress], None]:
    """Does it when the harvest has come to `at` tokens."""
    done: list[object] = []

    def report(now: Progress) -> None:
        if now.stage == "harvest" and now.done >= at and not done:
            done.append(do())

    return report


@pytest.mark.parametrize("index", [0, 3])
def test_a_shard_that_is_deleted_while_it_runs_is_written_again(
    index: int, begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    """Whether this run wrote it or another before."""
    for written in (0, 1, 2):
        shutil.rmtree(begun / f"shard-0000{written}")
    cache = harvest(
        tiny_settings(out=str(begun)), once(lambda: shutil.rmtree(begun / f"shard-0000{index}"), at=2 * 2048 + 512)
    )
    assert cache.missing() == []
    assert contents(begun) == contents(tiny_cache.path)
    assert not list(begun.glob(".*"))


def test_one_that_is_deleted_again_and_again_ends_the_run(
    begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(begun / "shard-00003")
    monkeypatch.setattr(Output, "publish", lambda self, cache, index: shutil.rmtree(begun / f"shard-0000{index}"))
    with pytest.raises(FailedRun, match="shard-00003 was deleted 3 times while this ran") as failed:
        harvest(tiny_settings(out=str(begun)))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("path", ["shard-00000/layer_03", "shard-00000/zarr.json", "tokens", "document_starts/c/0"])
def test_what_is_deleted_of_a_shard_or_of_the_tokens_while_it_runs_is_a_failed_run(
    path: str, begun: Path, tiny_settings: Settings
) -> None:
    shutil.rmtree(begun / "shard-00004")

    def delete() -> None:
        if (begun / path).is_dir():
            shutil.rmtree(begun / path)
        else:
            (begun / path).unlink()

    with pytest.raises(FailedRun, match=path.partition("/")[0]) as failed:
        harvest(tiny_settings(out=str(begun)), once(delete, at=128))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", ["tokens", "document_starts"])
def test_a_resumed_harvest_refuses_tokens_that_are_not_those_it_was_begun_with(
    name: str, begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would write shards of other text. It says so before the LM is loaded."""
    shutil.rmtree(begun / "shard-00002")
    (file,) = [path for path in (begun / name / "c").rglob("*") if path.is_file()]
    data = bytearray(file.read_bytes())
    data[16] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr("routesae.harvest.lm.model.load_lm", None)
    with pytest.raises(WrongInput, match=f"{name} is damaged: checksum differs.*harvest it again"):
        harvest(tiny_settings(out=str(begun)))
    assert Cache(begun).missing() == [2]


def test_a_folder_that_becomes_read_only_in_mid_run_is_a_failed_run(
    begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (1, 2):
        shutil.rmtree(begun / f"shard-0000{index}")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "shard-00002":
            raise OSError(30, "Read-only file system", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(
        FailedRun, match=r"can no longer be written \(Read-only file system\): 4 of 5 shards are there"
    ):
        harvest(tiny_settings(out=str(begun)))
    assert not list(begun.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: lm.model.layers[5].mlp.down_proj.weight[-1, -1].add_(0.5),
        lambda lm: lm.model.layers[0].mlp.down_proj.weight[-1, -1].mul_(1 + 1e-6),
    ],
    ids=["one value", "less than bfloat16 tells"],
)
def test_a_harvester_whose_lm_differs_in_one_value_writes_nothing(
    change: Callable[[Any], object], begun: Path, tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    for index in range(5):
        shutil.rmtree(begun / f"shard-0000{index}")
    change_attributes(begun, model=str(tmp_path / "model"))
    changed_model(tiny_model, tmp_path / "model", change)
    with pytest.raises(WrongInput, match=r"was begun with other weights than .*model has now"):
        harvest(tiny_settings(out=str(begun), model=str(tmp_path / "model")))
    assert Cache(begun).missing() == [0, 1, 2, 3, 4]


def test_what_is_being_written_is_no_group_and_under_no_name_that_can_be_told(
    begun: Path, tiny_settings: Settings
) -> None:
    """Zarr readers do not list a shard before it is whole, and nobody can put a link in its place."""
    import zarr

    for index in (1, 2):
        shutil.rmtree(begun / f"shard-0000{index}")
    names: list[str] = []
    listed: list[set[str]] = []

    def record(*arguments: Any) -> None:
        names.extend(path.name for path in begun.glob(".shard-*.partial"))
        listed.append(set(zarr.open_group(str(begun), mode="r").group_keys()))

    write_group = arrays.write_group

    def written(folder: Path, attributes: Any) -> None:
        write_group(folder, attributes)
        record()

    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Object at")
        patched.setattr(arrays, "write_group", written)
        harvest(tiny_settings(out=str(begun)))
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"\.shard-0000[12]\.[0-9a-f]{16}\.partial", name) for name in names)
    assert all(name.startswith("shard-") for group in listed for name in group)


def test_a_corpus_that_cannot_be_read_is_refused_before_the_lm_is_loaded(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    monkeypatch.setattr("routesae.harvest.lm.model.load_lm", None)
    for data, said in (("x.jsonl", "is neither a file nor a folder but a pipe"), ("y.jsonl", "does not exist")):
        with pytest.raises(WrongInput, match=said):
            harvest(tiny_settings(out=str(tmp_path / "shards"), data=str(tmp_path / data)))
    assert not (tmp_path / "shards").exists()


def test_a_pipe_in_a_model_s_folder_is_refused_by_name(
    tiny_model: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")
    with pytest.raises(WrongInput, match=r"model/config.json is neither a file nor a folder; take it out"):
        harvest(tiny_settings(out=str(tmp_path / "shards"), model=str(tmp_path / "model")))
