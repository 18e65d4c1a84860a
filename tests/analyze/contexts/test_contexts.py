"""The stage contexts: what it finds is what a plain loop over every activation finds, to the last bit."""

from __future__ import annotations

import heapq
import json
import math
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from routesae.analyze.contexts import best as contexts_best
from routesae.analyze.contexts.file import (
    CONTEXTS,
    FACTS,
    FORMAT,
    PARTS,
    SAMPLES,
    Context,
    ContextsFile,
    place_of,
    read_contexts,
)
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine.files import signed, write_json
from routesae.reporting import Progress, WrongInput
from routesae.tests.made_up import retrain
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import settings_of

VARIANTS = ("topk", "jumprelu", "routesae", "mlsae", "crosscoder")
# Sentences, both scripts, and what breaks pages and terminals: every byte must come through as it is.
HOSTILE = (
    "He said it. She (the router!) did not?\nA new line</script><script>alert('x')</script> & &amp; \\u0041. "
    "שלום עולם \u202eover\u202c. zero\u200bwidth\u200djoin \ufeffmark. 👩\u200d👧 family 東京。次の文！ é\ttab\r\n"
    '<ACTIVATED>not a mark</ACTIVATED> "quoted end." then a model reads the hidden state of a token and writes it. '
)
STRANGE = ("</script>", "שלום", "\u202e", "\u200b", "\ufeff", "👩\u200d👧", "京", "&amp;", "\\u0041", "\t", "\r")


@pytest.fixture(scope="module")
def hostile_cache(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three shards of 2,048 tokens or fewer, of documents that repeat HOSTILE at different offsets."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"document {n} " + HOSTILE[n % 40 :] + HOSTILE for n in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = str(folder / "texts.jsonl")
    return harvest(tiny_settings(data=data, tokens=5000, context=64, shard_tokens=2048, out=str(folder / "shards")))


@pytest.fixture(scope="module")
def saes(hostile_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SAE of each variant, in a folder named for it."""
    out = tmp_path_factory.mktemp("saes")
    for variant in VARIANTS:
        given = {"sae": variant, "cache": str(hostile_cache.path), "out": str(out), "name": variant}
        train(settings_of({**given, "latents": 96, "k": 6, "batch_tokens": 512, "lr": 1e-3, "device": "cpu"}))
    return out


@pytest.fixture
def copied(saes: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A variant's folder to write into."""

    def copy(variant: str) -> Path:
        return Path(shutil.copytree(saes / variant, tmp_path / "saes" / variant, dirs_exist_ok=True))

    return copy


# Where the rule keeps some latents and leaves some out.
THRESHOLDS = {"topk": 2.0, "jumprelu": 2.0, "routesae": 2.3, "mlsae": 2.3, "crosscoder": 1.0}
RULE: dict[str, Any] = {"max_classes": 12, "min_contexts": 4, "window": 12, "samples": 2, "seed": 3}


def run(cache: Cache, folder: Path, **changes: Any) -> tuple[dict[str, Any], ContextsFile]:
    given = {"cache": str(cache.path), "saes": (str(folder),), "device": "cpu", "threshold": THRESHOLDS[folder.name]}
    given["overwrite"] = True
    (result,) = contexts(ContextSettings(**{**given, **RULE, **changes}))
    return result, read_contexts(folder)


# ---------------------------------------------------------------------------------------------- the plain loop


class Active(NamedTuple):
    """One latent on one token; at: which of the SAE's layers, None where it was read from no one layer."""

    latent: int
    position: int
    at: int
    value: float


def every_activation(cache: Cache, folder: Path) -> list[Active]:
    """In the order of the disk, one shard a forward pass."""
    sae = load_sae(folder, torch.device("cpu"))
    found = []
    for shard in cache.shards():
        first = shard.record.rows[0] * cache.manifest.context
        positions = (np.asarray(shard.read("order")).astype(int) + first).tolist()
        hidden = [np.array(shard.read(f"layer_{layer:02}")) for layer in sae.recipe.layers]
        columns = [cache.manifest.layers.index(layer) for layer in sae.recipe.layers]
        means, stds = (np.array(shard.read(name)).T[columns, :, None] for name in ("token_mean", "token_std"))
        batch = [torch.from_numpy(array) for array in (np.stack(hidden), means, stds)]
        out = sae(Hidden(*batch))
        values = out.latents.dense()
        routes = [0] * len(positions) if out.routing_NL is None else out.routing_NL.argmax(1).tolist()
        for row, latent in torch.nonzero(values).tolist():
            n, at = row % len(positions), row // len(positions)
            found.append(Active(latent, positions[n], at or routes[n], float(values[row, latent])))
    return found


class Text:
    """The cache's tokens as a person reads them, one at a time."""

    def __init__(self, cache: Cache, window: int):
        self.tokenizer = AutoTokenizer.from_pretrained(cache.manifest.model)
        self.ids = np.asarray(cache.tokens()).reshape(-1).tolist()
        self.starts = set(np.asarray(cache.document_starts()).tolist())
        self.context, self.window = cache.manifest.context, window

        self.spellings: dict[int, str] = {}

    def spelled(self, position: int) -> str:
        token = self.ids[position]
        if token not in self.spellings:
            self.spellings[token] = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self.spellings[token]

    def token_class(self, position: int) -> str:
        """By the published code: the raw piece in lower case, with its mark of a blank."""
        return str(self.tokenizer.convert_ids_to_tokens(self.ids[position])).strip().lower()

    def cut_before(self, position: int) -> bool:
        """Whether a window may not hold both this position and the one before."""
        ended = re.search(r"""[.!?。！？]["'”’»)\]]*\s*$""", self.spelled(position - 1))
        line = set(self.spelled(position - 1)) & set("\n\r\u2028\u2029")
        special = {self.ids[position], self.ids[position - 1]} & {0, 1}
        row_begins = position % self.context == 0
        return bool(ended or line or special or row_begins or position in self.starts)

    def bounds(self, position: int) -> tuple[int, int]:
        first, after = position, position + 1
        while not self.cut_before(first):
            first -= 1
        while after < len(self.ids) and not self.cut_before(after):
            after += 1
        if after - first > self.window:
            half = self.window // 2
            first, after = max(first, position - half), min(after, position + self.window - half)
            whole_first = next(at for at in range(first, len(self.ids) + 1) if self.between_characters(at))
            whole_after = next(at for at in range(after, -1, -1) if self.between_characters(at))
            first = whole_first if whole_first <= position else first
            after = whole_after if whole_after > position else after
        return first, after

    def between_characters(self, position: int) -> bool:
        """Whether no character has bytes on both sides of the start of this position."""
        if position in (0, len(self.ids)) or self.cut_before(position):
            return True
        first = position
        while first and "\ufffd" in self.spelled(first - 1):
            first -= 1
        run = self.tokenizer.decode(self.ids[first:position], clean_up_tokenization_spaces=False)
        return not run.endswith("\ufffd")


def by_strength(active: Active) -> tuple[float, int, int]:
    return -active.value, active.position, active.at


def published_rule(found: list[Active], text: Text, rule: dict[str, Any]) -> dict[int, list[Active]]:
    """Latents that the rule keeps, their contexts strongest first: the published loop, with its heaps."""
    heaps: dict[int, dict[str, list[tuple[float, int, int, Active]]]] = defaultdict(lambda: defaultdict(list))
    for active in found:
        if active.value > rule["threshold"]:
            heap = heaps[active.latent][text.token_class(active.position)]
            heapq.heappush(heap, (active.value, -active.position, -active.at, active))
            if len(heap) > 2:
                heapq.heappop(heap)
    kept = {}
    for latent, classes in heaps.items():
        chosen = [entry[3] for heap in classes.values() for entry in heap]
        if len(classes) <= rule["max_classes"] and len(chosen) >= rule["min_contexts"]:
            kept[latent] = sorted(chosen, key=by_strength)
    return kept


def splitmix(active: Active, latents: int, layers: int, seed: int) -> int:
    x = (active.position * layers + active.at) * latents + active.latent + (seed + 1) * 0x9E3779B97F4A7C15
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def naive(cache: Cache, folder: Path, **changes: Any) -> tuple[dict[int, dict[str, list[Any]]], set[int]]:
    """{latent: {kind: contexts}} with everything a context has, and the latents that the rule keeps."""
    rule = {**RULE, "threshold": THRESHOLDS[folder.name], "choose": "rule", "top": 12, **changes}
    recipe = load_sae(folder, torch.device("cpu")).recipe
    text, found = Text(cache, rule["window"]), every_activation(cache, folder)
    of_latent: dict[int, list[Active]] = defaultdict(list)
    for active in found:
        of_latent[active.latent].append(active)
    values = {(a.latent, a.position, a.at if recipe.sae == "mlsae" else 0): a.value for a in found}

    def told(active: Active) -> Any:
        first, after = text.bounds(active.position)
        at = active.at if recipe.sae == "mlsae" else 0  # a routesae's window is read where each token was routed
        window = [values.get((active.latent, position, at), 0.0) for position in range(first, after)]
        document = sum(start <= active.position for start in text.starts) - 1
        layer = None if recipe.sae == "crosscoder" else recipe.layers[active.at]
        row, position = divmod(active.position, text.context)
        names = (text.token_class(active.position), active.value, layer, row, position, document)
        return *names, active.position - first, list(text.ids[first:after]), window

    kept = published_rule(found, text, rule)
    expected = {}
    for latent, all_of_it in of_latent.items():
        top = sorted(all_of_it, key=by_strength)[: rule["top"]]
        chosen = top if rule["choose"] == "top" else kept.get(latent, [])
        hashes = {a: splitmix(a, recipe.latents, len(recipe.layers), rule["seed"]) for a in all_of_it}
        sample = sorted(all_of_it, key=lambda a: -hashes[a])[: 3 * rule["samples"]]
        kinds: dict[str, list[Active]] = {"chosen": chosen, "top": top, **{name: [] for name in SAMPLES}}
        for rank, active in enumerate(sorted(sample, key=by_strength)):
            kinds[SAMPLES[rank * 3 // len(sample)]].append(active)
        expected[latent] = {kind: [told(a) for a in actives] for kind, actives in kinds.items()}
    return expected, set(kept)


def facts_of(context: Context) -> Any:
    c = context
    return c.token_class, c.activation, c.layer, c.row, c.position, c.document, c.at, c.token_ids, c.activations


def read(file: ContextsFile) -> dict[int, dict[str, list[Any]]]:
    kinds = {found.latent: {"chosen": found.chosen, "top": found.top, **found.samples} for found in file.latents()}
    return {latent: {kind: [facts_of(c) for c in cs] for kind, cs in of.items()} for latent, of in kinds.items()}


# ------------------------------------------------------------------------------------------- equal to that loop


@pytest.mark.parametrize("variant", VARIANTS)
def test_contexts_equal_a_plain_loops(
    variant: str, hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_best, "PENDING", 700)  # many merges
    monkeypatch.setattr(contexts_best, "LOOKED_UP", 100)
    result, file = run(hostile_cache, copied(variant))
    expected, kept = naive(hostile_cache, file.folder)
    assert read(file) == expected
    assert {summary.latent for summary in file.summaries if summary.kept} == kept
    assert result["Features"] == file.facts["features"] == len(kept)
    too_many = [summary for summary in file.summaries if summary.token_classes > RULE["max_classes"]]
    assert kept, "the rule must keep some here"
    assert too_many, "and leave some out"


@pytest.mark.parametrize("variant", VARIANTS)
def test_top_n_equals_a_plain_loops(variant: str, hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    result, file = run(hostile_cache, copied(variant), choose="top", top=7, seed=0)
    expected, kept = naive(hostile_cache, file.folder, choose="top", top=7, seed=0)
    assert read(file) == expected
    assert result["Features"] == len(kept)  # the published count, whatever is chosen
    assert result["chosen"] == len(expected)
    assert max(len(found["chosen"]) for found in expected.values()) == 7


def test_the_least_number_of_contexts_is_enough(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    folder = copied("topk")
    found = run(hostile_cache, folder, min_contexts=1)[1].latents()
    counts = sorted(len(latent.chosen) for latent in found if latent.chosen)
    middle = counts[len(counts) // 2]
    assert counts[0] < middle
    assert run(hostile_cache, folder, min_contexts=middle)[0]["Features"] == sum(count >= middle for count in counts)


@pytest.mark.parametrize("variant", ["topk", "mlsae"])
def test_the_size_of_batches_changes_nothing(
    variant: str, hostile_cache: Cache, copied: Callable[[str], Path]
) -> None:
    settings = [{"choose": choose, "batch_tokens": size} for choose in ("rule", "top") for size in (99, 4096)]
    found = [read(run(hostile_cache, copied(variant), **changes)[1]) for changes in settings]
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]


def test_summaries_are_those_of_all_activations(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    for variant in ("topk", "mlsae"):
        _, file = run(hostile_cache, copied(variant))
        values = defaultdict(list)
        for active in every_activation(hostile_cache, file.folder):
            values[active.latent].append(active.value)
        readings = hostile_cache.manifest.kept_tokens * (4 if variant == "mlsae" else 1)
        assert len(file.summaries) == 96
        for summary in file.summaries:
            mine = values[summary.latent]
            assert (summary.active, summary.density) == (len(mine), len(mine) / readings)
            assert summary.max_activation == max(mine, default=0)
            assert summary.mean_activation == pytest.approx(sum(mine) / max(1, len(mine)))
            bins = Counter(math.floor(4 * math.log2(value)) for value in mine)
            assert Counter(dict(enumerate(summary.histogram, summary.histogram_first))) == bins


# ------------------------------------------------------------------------------------------------- text is data


def test_text_is_exact(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    """Joined tokens are what the tokenizer makes of the window's ids, whatever stands in them."""
    _, file = run(hostile_cache, copied("topk"), choose="top", top=20, window=40)
    tokenizer = AutoTokenizer.from_pretrained(hostile_cache.manifest.model)
    seen = ""
    for found in file.latents():
        for context in found.chosen:
            assert context.text == tokenizer.decode(list(context.token_ids), clean_up_tokenization_spaces=False)
            assert len(context.tokens) == len(context.token_ids) == len(context.activations) <= 40
            seen += context.text
    for strange in STRANGE:
        assert strange in seen, repr(strange)


def test_published_json_has_its_shape_and_the_same_contexts(
    hostile_cache: Cache, copied: Callable[[str], Path]
) -> None:
    result, file = run(hostile_cache, copied("routesae"))
    written = json.loads((file.place / "contexts.json").read_text(encoding="utf-8"))
    published = ("total_latents", "threshold", "max_length", "max_per_token", "lines")
    assert [written[name] for name in published] == [result["Features"], THRESHOLDS["routesae"], 12, 2, 3]
    assert list(written) == [*published, "routesae", "latent_context_map", "latent_sample_map"]
    assert written["routesae"].items() <= file.facts.items()
    chosen = {found.latent: found for found in file.latents() if found.chosen}
    assert list(written["latent_context_map"]) == list(written["latent_sample_map"]) == [str(n) for n in chosen]
    for latent, by_class in written["latent_context_map"].items():
        assert list(by_class) == sorted(by_class)
        for token_class, entries in by_class.items():
            mine = [context for context in chosen[int(latent)].chosen if context.token_class == token_class]
            assert [entry["activation"] for entry in entries] == [context.activation for context in mine]
            for name in ("layer", "row", "position", "document"):
                assert [entry[name] for entry in entries] == [getattr(context, name) for context in mine]
            for entry, context in zip(entries, mine, strict=True):
                assert entry["context"] == context.marked()
                assert f"<ACTIVATED>{context.word}</ACTIVATED>" in entry["context"]
                assert context.word, "a mark covers whole characters"
                assert (
                    entry["context"].replace(f"<ACTIVATED>{context.word}</ACTIVATED>", context.word, 1)
                    == context.text
                )
    for latent, kinds in written["latent_sample_map"].items():
        assert [len(kinds[kind]) for kind in SAMPLES] == [len(chosen[int(latent)].samples[kind]) for kind in SAMPLES]


def test_facts_say_what_was_read_and_from_what(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    folder = copied("topk")
    _, file = run(hostile_cache, folder)
    assert file.facts["settings"]["threshold"] == 2.0
    assert file.facts["cache"]["tokens_hash"] == hostile_cache.manifest.tokens_hash
    assert file.facts["tokens"] == hostile_cache.manifest.kept_tokens
    assert file.facts["sae"]["recipe"]["sae"] == "topk"
    again = run(hostile_cache, folder)[1]
    assert (again.fingerprint, again.facts) == (file.fingerprint, file.facts)
    assert run(hostile_cache, folder, seed=4)[1].fingerprint != file.fingerprint
    assert not list(folder.rglob(".*")), "nothing half-written stays behind"


def test_only_wanted_latents_are_read(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    _, file = run(hostile_cache, copied("topk"), choose="top", top=2)
    everything = {found.latent: found for found in file.latents()}
    two = sorted(everything)[3:5]
    assert list(file.latents(two)) == [everything[latent] for latent in two]


def test_one_pass_serves_all_saes_and_where_nothing_is_kept_the_way_out_is_said(
    hostile_cache: Cache, copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folders = (str(copied("topk")), str(copied("mlsae")))
    seen: list[Progress] = []
    given = ContextSettings(cache=str(hostile_cache.path), saes=folders, device="cpu", threshold=1000.0)
    results = contexts(given, seen.append)
    assert {now.stage for now in seen} == {"contexts"}
    assert [now.done for now in seen] == sorted({now.done for now in seen})
    assert seen[-1].done == seen[-1].total == hostile_cache.manifest.kept_tokens
    assert [result["Features"] for result in results] == [0, 0]
    assert [record.getMessage() for record in caplog.records] == [
        f"{result['sae']}: the rule keeps no latent; the strongest activation is {result['strongest']:.1f}: "
        "give a --threshold well below it"
        for result in results
    ]
    caplog.clear()
    contexts(given.replace(threshold=2.0, max_classes=100, min_contexts=1, overwrite=True))
    assert caplog.records == []


def test_parts_of_the_file_without_a_wanted_latent_are_not_read(
    hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routesae.analyze.contexts.run.BATCH_CONTEXTS", 20)  # many row groups, none of half a latent
    _, file = run(hostile_cache, copied("topk"), choose="top", top=2)
    everything = {found.latent: found for found in file.latents()}
    with pq.ParquetFile(file.place / "contexts.parquet") as parquet:
        groups = [
            set(parquet.read_row_group(n)["latent"].to_pylist()) for n in range(parquet.metadata.num_row_groups)
        ]
        column = parquet.metadata.row_group(5).column(0)
    assert len(groups) > 8
    damaged = bytearray((file.place / "contexts.parquet").read_bytes())
    damaged[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    (file.place / "contexts.parquet").write_bytes(damaged)
    for wanted in ({min(groups[3])}, {max(groups[3])}, {min(groups[2]), max(groups[6])}, {10**6}, set()):
        assert list(file.latents(wanted)) == [everything[latent] for latent in sorted(wanted & set(everything))]
    with pytest.raises(WrongInput, match=r"contexts.parquet cannot be read"):
        list(file.latents({max(groups[5])}))


# ------------------------------------------------------------------------------------------------- wrong input


def test_another_models_tokenizer_is_refused(
    hostile_cache: Cache, copied: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    vocabulary = (other / "tokenizer.json").read_text().replace('"<s>"', '"<begin>"')
    (other / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(WrongInput, match=r"its tokenizer differs .* --model"):
        run(hostile_cache, copied("topk"), model=str(other))


def test_a_tokenizer_without_its_model_is_enough(
    hostile_cache: Cache, copied: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, alone)
    assert run(hostile_cache, copied("topk"), model=str(alone))[0]["contexts"] > 0


def test_missing_and_damaged_files_are_named(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    folder = copied("topk")
    assert read_contexts(folder) is None
    place = run(hostile_cache, folder)[1].place
    for name in (*PARTS, FACTS):
        whole = (place / name).read_bytes()
        for damage in (whole[:100], whole[:-9], None):
            (place / name).unlink() if damage is None else (place / name).write_bytes(damage)
            if damage is not None or name != FACTS:
                said = rf"{name} (cannot be read \(.*\)|does not exist); run routesae contexts again"
                with pytest.raises(WrongInput, match=said):
                    read_contexts(folder)
        (place / name).write_bytes(whole)
    (place / FACTS).write_text("[]")
    with pytest.raises(WrongInput, match=r"facts.json cannot be read"):
        analyze(AnalyzeSettings(cache=str(hostile_cache.path), saes=(str(folder),), metrics=("L0",), device="cpu"))


@pytest.mark.parametrize("renamed", range(1, 5))
def test_a_kill_between_the_files_of_a_second_run_is_noticed(
    renamed: int, hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("topk")
    before = {file.name: file.read_bytes() for file in run(hostile_cache, folder)[1].place.iterdir()}
    count = 0

    def replace(partial: Path, path: Path) -> Path:
        nonlocal count
        count += 1
        if count > renamed:
            raise KeyboardInterrupt  # as good as a kill: nothing more is renamed
        return rename(partial, path)

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    if renamed == 4:
        run(hostile_cache, folder, seed=9, threshold=2.5)
        now = {file.name: file.read_bytes() for file in read_contexts(folder).place.iterdir()}
        assert now.keys() == before.keys()
        assert not now.items() & before.items()
        return
    with pytest.raises(KeyboardInterrupt):
        run(hostile_cache, folder, seed=9, threshold=2.5)
    monkeypatch.undo()
    with pytest.raises(WrongInput, match=rf"({'|'.join(PARTS)}) cannot be read \(it is not the one"):
        read_contexts(folder)


def test_every_flipped_bit_is_noticed(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    folder = copied("topk")
    place = run(hostile_cache, folder)[1].place
    rng = random.Random(0)
    for name in (*PARTS, FACTS):
        whole = (place / name).read_bytes()
        for _ in range(12):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            (place / name).write_bytes(flipped)
            with pytest.raises(WrongInput, match="run routesae contexts again"):
                list(read_contexts(folder).latents())
        (place / name).write_bytes(whole)


def test_damage_after_opening_is_named_when_it_is_read(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    file = run(hostile_cache, copied("topk"))[1]
    whole = (file.place / CONTEXTS).read_bytes()
    for at in (300, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (file.place / CONTEXTS).write_bytes(flipped)
        with pytest.raises(WrongInput, match=r"contexts.parquet cannot be read"):
            list(file.latents())


def test_contexts_of_another_format_are_refused(hostile_cache: Cache, copied: Callable[[str], Path]) -> None:
    folder = copied("topk")
    place = run(hostile_cache, folder)[1].place
    facts = json.loads((place / FACTS).read_text())
    write_json(place / FACTS, signed({**facts, "format": FORMAT + 1}))
    message = rf"has format {FORMAT + 1}, and only {FORMAT} is read\); run routesae contexts again"
    with pytest.raises(WrongInput, match=message):
        read_contexts(folder)


@pytest.mark.parametrize("name", [*PARTS, FACTS])
def test_nothing_is_written_through_a_link(
    name: str, hostile_cache: Cache, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """Neither through one that has a partial file's old, fixed name, nor through one in the place of a file."""
    folder, outside = copied("topk"), tmp_path / "bashrc"
    outside.write_text("precious")
    place = place_of(folder, hostile_cache.manifest.to_dict())
    place.mkdir(parents=True)
    for link in (place / f".{name}.partial", place / name, folder / f".{name}.partial"):
        link.symlink_to(outside)
    run(hostile_cache, folder)
    assert outside.read_text() == "precious"
    assert not (place / name).is_symlink()


@pytest.mark.parametrize("linked", ["contexts", "contexts/corpus"])
def test_a_folder_that_leads_elsewhere_is_refused(
    linked: str, hostile_cache: Cache, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied("topk")
    place = place_of(folder, hostile_cache.manifest.to_dict())
    path = place if "/" in linked else place.parent
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongInput, match="is a symbolic link"):
        run(hostile_cache, folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --------------------------------------------------------------------------------------------- the command line


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_counts_features_and_analyze_shows_them(
    hostile_cache: Cache, copied: Callable[[str], Path]
) -> None:
    out = copied("topk").parent
    copied("crosscoder")
    flags = ["--cache", hostile_cache.path, "--out", out, "--device", "cpu"]
    code, output = invoke("contexts", *flags, "--threshold", 2, "--max-classes", 12, "--min-contexts", 4)
    assert code == 0, output
    features = {name: read_contexts(out / name).facts["features"] for name in ("topk", "crosscoder")}
    for name, count in features.items():
        assert re.search(rf"^ *{name} +96 +{count} ", output, re.MULTILINE), output
        assert f"{read_contexts(out / name).place}: contexts.json, contexts.parquet, latents.parquet" in output
    summary = signed({"score": 3.25, "unanswered": 0, "last_loss": None})
    write_json(out / "topk" / "interpretations.json", summary)
    code, output = invoke("analyze", "--metric", "L0", *flags)
    assert code == 0, output
    head, _, *rows = (line.split() for line in output.splitlines()[:4])
    assert head == ["sae", "variant", "layers", "latents", "L0", "Features", "Score"]
    assert {row[0]: row[-2:] for row in rows} == {
        "crosscoder": [str(features["crosscoder"]), "-"],
        "topk": [str(features["topk"]), "3.250"],
    }


def test_features_counted_by_different_thresholds_are_not_compared_in_silence(
    hostile_cache: Cache, copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folders = [copied("topk"), copied("crosscoder")]
    asked = AnalyzeSettings(
        cache=str(hostile_cache.path), saes=tuple(map(str, folders)), metrics=("L0",), device="cpu"
    )
    for threshold, said in ((2.0, []), (3.0, ["Features are not counted alike: topk above 3, crosscoder above 2;"])):
        for folder in folders[: 2 if threshold == 2.0 else 1]:
            run(hostile_cache, folder, threshold=threshold)
        caplog.clear()
        analyze(asked)
        found = [record.getMessage() for record in caplog.records if "Features" in record.getMessage()]
        assert [message.partition(" run ")[0] for message in found] == said


def test_a_wrong_tokenizer_is_one_line_and_exit_code_2(
    hostile_cache: Cache, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    code, output = invoke("contexts", "--cache", hostile_cache.path, "--sae", copied("topk"), "--model", tmp_path)
    assert code == 2
    assert output.startswith("routesae: model ")
    assert output.count("\n") == 1


def test_contexts_of_another_rule_are_not_replaced_unasked(
    hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("topk")
    given = ContextSettings(cache=str(hostile_cache.path), saes=(str(folder),), device="cpu", threshold=2.0)
    contexts(given)
    place = read_contexts(folder).place
    before = (place / CONTEXTS).read_bytes()
    monkeypatch.setattr("routesae.analyze.contexts.run.collect", None)  # nothing is computed before it is refused
    for changes, message in (
        ({"threshold": 3.0}, r"topk has contexts of --threshold 2.0, now 3.0; give --overwrite to replace them"),
        ({"top": 4, "seed": 1}, r"of --top 12, now 4; --seed 0, now 1; give --overwrite"),
    ):
        with pytest.raises(WrongInput, match=message):
            contexts(given.replace(**changes))
    assert (place / CONTEXTS).read_bytes() == before
    monkeypatch.undo()
    contexts(given.replace(batch_tokens=99))  # the same contexts again
    contexts(given.replace(threshold=3.0, overwrite=True))
    assert read_contexts(folder).facts["settings"]["threshold"] == 3.0
    retrain(folder)
    contexts(given.replace(threshold=3.0))  # those of what was there before are of no use


def test_an_sae_that_cannot_be_written_to_is_refused_before_the_cache_is_read(
    hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("topk")
    monkeypatch.setattr("routesae.analyze.contexts.run.collect", None)
    monkeypatch.setattr("routesae.machine.settings.os.access", lambda path, mode: Path(path) != folder)
    with pytest.raises(WrongInput, match=r"topk is read-only, and contexts go there; change that, or copy the SAE"):
        contexts(ContextSettings(cache=str(hostile_cache.path), saes=(str(folder),), device="cpu"))


def test_contexts_of_two_corpora_lie_side_by_side(
    hostile_cache: Cache, copied: Callable[[str], Path], tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    folder = copied("topk")
    first = run(hostile_cache, folder)[1]
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps({"text": HOSTILE * 40}) + "\n")
    other = harvest(
        tiny_settings(data=str(data), tokens=1500, context=64, shard_tokens=2048, out=str(tmp_path / "c"))
    )
    contexts(ContextSettings(cache=str(other.path), saes=(str(folder),), device="cpu", threshold=2.0))
    of_first, of_other = (read_contexts(folder, cache.manifest.tokens_hash) for cache in (hostile_cache, other))
    assert (of_first.facts, of_first.place) == (first.facts, first.place)
    assert of_other.facts["cache"]["corpus"] == str(data)
    assert of_other.place.name.startswith("other.jsonl-")
    with pytest.raises(WrongInput, match=r"has contexts of several corpora, .*other.jsonl-.* with --cache"):
        read_contexts(folder)


def test_documents_of_more_text_than_one_array_of_strings_holds_are_looked_up(
    hostile_cache: Cache, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four row groups with 550 MB of places each, which are never looked at, and over 2 GB together."""
    kept, size = hostile_cache.documents(), 550_000_000
    places = kept["place"].to_pylist()

    def row_group(number: int, some: list[str]) -> pa.DictionaryArray:
        text, small = np.zeros(size, np.uint8), "".join(some).encode()  # zeros that nobody reads take no memory
        text[size - len(small) :] = np.frombuffer(small, np.uint8)
        starts = np.append(number, size - len(small) + np.cumsum([0, *(len(one.encode()) for one in some)]))
        offsets, indices = pa.py_buffer(starts.astype("<i4")), pa.array(range(1, len(some) + 1), pa.int32())
        values = pa.StringArray.from_buffers(len(some) + 1, offsets, pa.py_buffer(text))
        return pa.DictionaryArray.from_arrays(indices, values)

    large = pa.chunked_array([row_group(n, places[10 * n : 10 * n + 10 if n < 3 else None]) for n in range(4)])
    _, before = run(hostile_cache, copied("topk"))
    monkeypatch.setattr(Cache, "documents", lambda self: pa.table({"data": kept["data"], "place": large}))
    assert list(run(hostile_cache, copied("topk"))[1].latents()) == list(before.latents())
