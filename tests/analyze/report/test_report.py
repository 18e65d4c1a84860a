"""What the report says of SAEs is so: nearest latents, logit effects, routing by token, the table, the file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from click.testing import CliRunner

from routesae.analyze.contexts.file import read_contexts, words_of
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.lm import lm_of_sae, load_lm_of
from routesae.analyze.latents.text import latents
from routesae.analyze.report import plots
from routesae.analyze.report.latents import PIECE, WORDS_LISTED, latent_pairs, packed
from routesae.analyze.report.lens import NEAREST, TOKENS, LogitLens, nearest
from routesae.analyze.report.plots import draw_plots
from routesae.analyze.report.run import Page, write_report
from routesae.analyze.report.runs import read_runs, table_of
from routesae.analyze.report.serve import page_server
from routesae.analyze.report.settings import ReportSettings
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.harvest.lm.model import LanguageModel, load_lm, load_tokenizer
from routesae.machine.files import signed, write_json
from routesae.machine.settings import LMSettings
from routesae.reporting import WrongInput
from routesae.tests.analyze.interpret.chat_server import write_answer
from routesae.tests.made_up import retrain
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.settings import settings_of

CPU = torch.device("cpu")
SAES = ("crosscoder", "routesae", "topk")
ROW = {"sae": "topk", "folder": "topk", "variant": "topk"}  # of analyze --json
LATENTS = 200  # more than one piece, and a last one that is not full


@pytest.fixture(scope="module")
def cache(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A copy that a test may take away for a while."""
    return Cache(shutil.copytree(tiny_cache.path, tmp_path_factory.mktemp("cache") / "shards"))


@pytest.fixture(scope="module")
def saes(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routesae, a crosscoder and a topk; contexts of the first two, an explanation of the first."""
    out = tmp_path_factory.mktemp("saes")
    for variant in SAES:
        given: dict[str, Any] = {"sae": variant, "cache": str(cache.path), "out": str(out), "name": variant}
        train(settings_of({**given, "latents": LATENTS, "k": 6, "batch_tokens": 512, "lr": 1e-3, "device": "cpu"}))
    picked = tuple(str(out / name) for name in ("crosscoder", "routesae"))
    contexts(ContextSettings(cache=str(cache.path), saes=picked, threshold=1.0, device="cpu"))
    write_answer(out / "routesae", 3, explanation="words about </script>")
    counts = {"unanswered": 0, "last_loss": None}
    summary = {"score": 4.0, **counts, "detection": {"balanced_accuracy": 0.75, "latents": 1, **counts}}
    write_json(out / "routesae" / "interpretations.json", signed(summary))
    return out


def blocks(page: Path) -> dict[str, Any]:
    """What the page carries, by the id of its element."""
    found = re.findall(r'<script type="application/gzip" id="([^"]+)">([^<]*)</script>', page.read_text())
    return {name: json.loads(gzip.decompress(base64.b64decode(data))) for name, data in found}


# ----------------------------------------------------------------------------------------- nearest, logit effects


def test_nearest_latents_are_those_of_the_largest_cosine_whatever_the_piece() -> None:
    W_dec = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(0))  # as of a crosscoder
    cosine_FF = torch.nn.functional.cosine_similarity(W_dec.flatten(1)[:, None], W_dec.flatten(1)[None], dim=2)
    for first, after in ((0, 50), (13, 20), (49, 50)):
        unit_FC = torch.nn.functional.normalize(W_dec.flatten(1))
        cosine_nK, latent_nK = nearest(unit_FC[first:after], unit_FC, NEAREST, itself=first)
        for row, latent in enumerate(range(first, after)):
            others = sorted((i for i in range(50) if i != latent), key=lambda i: -float(cosine_FF[latent, i]))
            assert latent_nK[row].tolist() == others[:NEAREST]
            torch.testing.assert_close(cosine_nK[row], cosine_FF[latent, others[:NEAREST]])


def test_a_dictionary_smaller_than_the_neighbours_shown_has_fewer() -> None:
    assert nearest(torch.eye(3), torch.eye(3), NEAREST, itself=0)[1].shape == (3, 2)
    assert nearest(torch.eye(1), torch.eye(1), NEAREST, itself=0)[1].shape == (1, 0)


def test_pairs_are_each_latents_nearest_in_the_other_sae() -> None:
    one_FC, other_FC = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (300, 40))
    cosine_FF = torch.nn.functional.cosine_similarity(one_FC[:, None], other_FC[None], dim=2)
    found = latent_pairs(torch.nn.functional.normalize(one_FC), torch.nn.functional.normalize(other_FC))
    assert found["latent"] == cosine_FF.argmax(1).tolist()
    np.testing.assert_allclose(found["cosine"], cosine_FF.amax(1), atol=6e-4)


def test_logit_effect_is_the_unembedding_of_the_direction_times_the_norms_weight(tiny_model: Path) -> None:
    lm = load_lm(str(tiny_model), device=CPU, lm_dtype="float32")
    with torch.no_grad():
        lm.model.model.norm.weight.copy_(torch.linspace(0.1, 2, lm.width))
    d_nD = torch.randn(7, lm.width, generator=torch.Generator().manual_seed(1)) * 5
    rms_n1 = d_nD.square().mean(1, keepdim=True).sqrt()
    expected_nV = (d_nD / rms_n1 * lm.model.model.norm.weight) @ lm.model.lm_head.weight.T
    texts = [str(token) for token in range(expected_nV.shape[1])]
    lens = LogitLens(lm, texts)
    torch.testing.assert_close(lens.logits(d_nD), expected_nV, rtol=1e-4, atol=1e-4)
    effects = lens.effects(d_nD)
    for row in range(7):
        order = expected_nV[row].argsort(descending=True).tolist()
        assert [int(text) for text, _ in effects["promoted"][row]] == order[:TOKENS]
        assert [int(text) for text, _ in effects["suppressed"][row]] == order[::-1][:TOKENS]
        assert effects["promoted"][row][0][1] == pytest.approx(float(expected_nV[row].max()), rel=1e-3)
        assert effects["suppressed"][row][0][1] == pytest.approx(float(expected_nV[row].min()), rel=1e-3)
    layers_nLD = torch.stack([torch.randn_like(d_nD), d_nD], dim=1)
    assert lens.effects(layers_nLD.flatten(1)) == effects  # a crosscoder's last layer


def test_logit_effect_leaves_out_the_biases_of_norm_and_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8)).eval()
    model.lm_head = torch.nn.Linear(16, 40)
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
        model.transformer.ln_f.weight.normal_()
        d_nD = torch.randn(5, 16)
        scaled_nD = d_nD / d_nD.square().mean(1, keepdim=True).sqrt()
        normed_nD = torch.nn.functional.layer_norm(scaled_nD, (16,), model.transformer.ln_f.weight)
        expected_nV = normed_nD @ model.lm_head.weight.T
        found_nV = LogitLens(LanguageModel(model, model.transformer.h, 16, CPU), [""] * 40).logits(d_nD)
    torch.testing.assert_close(found_nV, expected_nV, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- routing


def test_routing_by_token_is_what_the_router_does_with_every_held_out_token(
    saes: Path, cache: Cache, tiny_model: Path
) -> None:
    sae = load_sae(saes / "routesae", CPU)
    vocabulary = Vocabulary(load_tokenizer(str(tiny_model)))
    found = read_contexts(saes / "routesae").facts["routes"]
    assert read_contexts(saes / "crosscoder").facts["routes"] == {}
    token_ids_ST = cache.tokens()
    expected: dict[str, np.ndarray] = {}
    for shard in cache.shards():
        order_n = shard.read("order")
        layers = [torch.tensor(shard.read(f"layer_{layer:02}")[: len(order_n)]) for layer in sae.recipe.layers]
        at_n = sae.routes(torch.stack(layers, dim=1)).at_R
        for at, flat in zip(at_n.tolist(), order_n.tolist(), strict=True):
            row, position = divmod(flat, token_ids_ST.shape[1])
            if (row := row + shard.record.rows[0]) < cache.manifest.train_rows:
                continue
            name = vocabulary.class_texts[vocabulary.class_V[token_ids_ST[row, position]]]
            expected.setdefault(name, np.zeros(len(layers)))[at] += 1
    assert found["held_out"]
    assert found["tokens"] == sum(counts.sum() for counts in expected.values())
    assert found["counts"] == sorted((int(counts.sum()) for counts in expected.values()), reverse=True)[:40]
    for name, count, shares in zip(found["classes"], found["counts"], found["shares"], strict=True):
        assert count == expected[name].sum()
        np.testing.assert_allclose(shares, expected[name] / count, atol=1e-4)


# ----------------------------------------------------------------------------------------- the table


def scores_of(saes: Path, folder: Path, *rows: dict[str, Any]) -> str:
    """A file such as analyze --json writes."""
    rows = tuple({"folder": row["sae"], "variant": "topk", **row} for row in rows)
    write_json(folder / "scores.json", signed({"saes": rows}))
    return str(folder / "scores.json")


def test_table_has_what_is_known(saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"sae": "routesae", "folder": str(saes / "routesae"), "KLDiv": 0.5, "NormMSE": 0.25, "Shares": {"2": 1.0}},
        {"sae": "topk", "folder": "elsewhere/topk", "KLDiv": 0.25, "layers": "9-9"},
    ]
    runs = read_runs((), saes, scores_of(saes, tmp_path, *rows))
    columns, cells = table_of(runs)
    names = [column.name for column in columns]
    assert names[:4] == ["variant", "layers", "latents", "k"]
    assert "Recovered" not in names
    table = {run.name: dict(zip(names, row, strict=True)) for run, row in zip(runs, cells, strict=True)}
    assert list(table) == ["crosscoder", "routesae", "topk"]
    assert table["routesae"]["NormMSE"].value == 0.25  # the file's, not the one of training's end
    assert table["topk"]["KLDiv"].text == "0.250"
    assert table["topk"]["layers"].text == str(runs[2].recipe.layers[0])
    assert table["crosscoder"]["KLDiv"].value is None
    assert (table["routesae"]["Score"].value, table["routesae"]["detection"].value) == (4.0, 0.75)
    assert runs[1].shares == {"2": 1.0}
    held_out = json.loads((saes / "topk" / "cfg.json").read_text())["metadata"]["routesae"]["source"]["held_out"]
    assert table["topk"]["NormMSE"].value == held_out["norm_mse"]
    assert not caplog.messages


@pytest.mark.parametrize("row", [{"sae": "another"}, {"sae": "topk", "infer_k": 4}])
def test_scores_of_none_of_the_saes_are_remarked_on(
    row: dict[str, Any], saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = scores_of(saes, tmp_path, {**row, "KLDiv": 0.5})
    read_runs((), saes, file)
    assert caplog.messages == [f"--scores {file} has scores of none of these SAEs as they were trained"]


@pytest.mark.parametrize(
    ("intervals", "best"),
    [
        (([0.1, 0.2], [0.3, 0.4], [0.25, 0.5]), "crosscoder"),
        (([0.1, 0.3], [0.3, 0.4], [0.25, 0.5]), None),  # it meets another's
        (([0.1, 0.2], None, [0.25, 0.5]), None),  # of one it is not known
    ],
)
def test_a_value_is_best_only_where_the_intervals_say_so(
    intervals: Any, best: str | None, saes: Path, tmp_path: Path
) -> None:
    rows = [
        {"sae": name, "KLDiv": value, "Recovered": value, "Features": n, "intervals": {"KLDiv": ends} if ends else {}}
        for n, (name, value, ends) in enumerate(
            zip(("crosscoder", "routesae", "topk"), (0.15, 0.35, 0.3), intervals, strict=True)
        )
    ]
    runs = read_runs((), saes, scores_of(saes, tmp_path, *rows))
    columns, cells = table_of(runs)
    marked = [
        (run.name, column.name)
        for run, row in zip(runs, cells, strict=True)
        for column, cell in zip(columns, row, strict=True)
        if cell.best
    ]
    assert marked == ([(best, "KLDiv")] if best else [])
    (noted,) = [cell.note for column, cell in zip(columns, cells[0], strict=True) if column.name == "KLDiv"]
    assert noted == f"95 % interval: {intervals[0][0]} to {intervals[0][1]}"


def test_plots_are_of_the_pages_colours_and_leave_out_what_is_flat(saes: Path, tmp_path: Path) -> None:
    intervals = {"NormMSE": [0, 1]}
    rows = [{"sae": name, "L0": 6.0, "NormMSE": n / 9, "intervals": intervals} for n, name in enumerate(SAES)]
    runs = read_runs((), saes, scores_of(saes, tmp_path, *rows))
    plots = draw_plots(runs)
    titles = [plot.title.partition(",")[0] for plot in plots]
    assert [plot.section for plot in plots] == ["runs", "curves", "curves", "routing", "density"]
    assert titles[1:3] == ["NormMSE in training", "L0 in training"]
    of_exact_k = [plot.title.partition(",")[0] for plot in draw_plots(runs[1:])]
    assert of_exact_k == [titles[0], titles[1], *titles[3:]]
    for plot in plots:
        svg = str(plot.svg)
        assert svg.startswith("<svg")
        assert "var(--series-" in svg
        assert all((name in svg) == (plot.section == "runs") for name in SAES)  # elsewhere the legend has them
        assert re.findall(r"#0[0-9a-f]{5}\b", svg) == []  # a stand-in colour that stayed
        assert any(run.name in plot.alternative for run in runs)


def test_no_name_of_a_point_lies_over_another() -> None:
    random = np.random.default_rng(0)
    demo = [(64.6, 0.9755), (64.0, 0.9752), (64.0, 0.9741)]
    for points in (demo, *(random.uniform(0, 1, (9, 2)).tolist() for _ in range(5))):
        figure, axes = plots._figure("L0")
        axes.plot(*zip(*points, strict=True), "o")
        figure.draw_without_rendering()
        names = (
            "batchtopk_layer15_4608_k64",
            "routesae_hard_4608_k64",
            *(f"topk_layer{n}_4608_k64" for n in range(7)),
        )
        plots._name_points(axes, dict(zip(names, map(tuple, points), strict=False)))
        figure.draw_without_rendering()
        boxes = [text.get_tightbbox() for text in axes.texts]
        assert not [one for one, other in combinations(boxes, 2) if one.overlaps(other)]


def test_ticks_are_round_numbers(saes: Path, tmp_path: Path) -> None:
    row = {"sae": "routesae", "Shares": {"2": 0.17, "3": 0.05}}  # in steps of 2.5 % there would be fewer than 10
    runs = read_runs((), saes, scores_of(saes, tmp_path, row))
    (shares,) = [plot for plot in draw_plots(runs) if plot.title.startswith("Tokens routed")]
    ticks = [float(text) for text in re.findall(r">([\d.]+)%</text>", str(shares.svg))]
    (step,) = {round(after - before, 6) for before, after in pairwise(ticks)}
    assert len(ticks) > 2
    assert step / 10 ** math.floor(math.log10(step)) in (1, 2, 5)


# ----------------------------------------------------------------------------------------- the file


def test_page_carries_every_latent_with_its_contexts(saes: Path, tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    arguments = ["report", "--out", saes, "--html", page, "--model", tiny_model, "--contexts", "4", "--device", "cpu"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    size = page.stat().st_size
    assert result.stdout == f"{page}: 3 SAEs, {2 * LATENTS} latents to look at, {size / 1000:.1f} kB\n"
    found = blocks(page)
    pieces = [f"piece-{run}-{at}" for run in (0, 1) for at in (0, 1)]
    assert list(found) == [
        "shared",
        "list-0",
        "list-1",
        *pieces,
    ]  # and no pairs: a crosscoder writes to several layers
    assert [run["browsable"] for run in found["shared"]["runs"]] == [True, True, False]
    assert found["shared"]["runs"][0]["routes"] is None
    assert len(found["shared"]["runs"][1]["routes"]["classes"]) > 5
    assert found["list-1"]["score"][3] == 4
    assert found["list-1"]["explained"] == {"3": ["answered", "low-level", "words about </script>"]}
    written = 0
    for latent in read_contexts(saes / "routesae").latents():
        piece = found[f"piece-1-{latent.latent // PIECE}"]
        told = piece["contexts"][str(latent.latent)]
        top = {(c.row, c.position, c.layer): c for c in latent.top[:4]}
        besides = [c for c in latent.chosen[:4] if (c.row, c.position, c.layer) not in top]
        given = [
            *top.values(),
            *besides,
            *(latent.samples[kind][0] for kind in latent.samples if latent.samples[kind]),
        ]
        assert len(told) == len(given)
        for (_, activation, layer, row, position, _, at, words, active, values), context in zip(
            told, given, strict=True
        ):
            assert "".join(piece["words"][word] for word in words) == context.text
            assert (layer, row, position, at) == (context.layer, context.row, context.position, context.at)
            assert activation == pytest.approx(context.activation, rel=1e-3)
            assert values == pytest.approx([context.activations[token] for token in active], rel=1e-3)
            assert {token for token, value in enumerate(context.activations) if value > 0} == set(active)
            written += 1
        assert len(piece["promoted"][latent.latent % PIECE]) == TOKENS
    assert written > 100
    sae = load_sae(saes / "routesae", CPU)
    unit_FC = torch.nn.functional.normalize(sae.dictionary.W_dec_FD.detach())
    _, near_nK = nearest(unit_FC[-1:], unit_FC, NEAREST, itself=LATENTS - 1)
    assert found["piece-1-1"]["near"][-1] == near_nK[0].tolist()


def test_page_is_the_same_bytes_again_and_lets_only_its_own_script_run(saes: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.html", tmp_path / "b.html"
    for page in (first, second):
        write_report(ReportSettings(out=str(saes), html=str(page), device="cpu"))
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in text
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_packed_text_cannot_end_the_element_it_stands_in() -> None:
    hostile = {"text": "</script><script>alert(1)</script>\u2028\u202e\u200b\ud800 &lt; '\""}
    data = packed(hostile)
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", data)
    assert json.loads(gzip.decompress(base64.b64decode(data))) == hostile


# ----------------------------------------------------------------------------------------- characters of many tokens


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("the", " cat"), ["the", " cat"]),
        (("", "", "न", "", "", "ि", " ", "", "न"), ["नि", " ", "न"]),  # Hindi: a letter and its vowel sign
        (("", "แ", "", "ม", "", "่"), ["แ", "ม่"]),
        (("か", "", "\u3099", "", "日"), ["か\u3099", "日"]),
        (("👩", "", "\u200d", "", "👧", "!"), ["👩\u200d👧", "!"]),
        (("🇮", "🇳", "🇹", "🇭"), ["🇮🇳", "🇹🇭"]),
        (("", "日", "\ufffd"), ["日", "\ufffd"]),  # the window cut a character
        (("a", "", ""), ["a"]),  # tokens that complete nothing go with what stands before them
        (("", ""), [""]),
    ],
)
def test_tokens_that_share_a_character_are_one_word(tokens: tuple[str, ...], words: list[str]) -> None:
    found = words_of(tokens)
    assert ["".join(tokens[word.start : word.stop]) for word in found] == words
    assert [at for word in found for at in word] == list(range(len(tokens)))


def test_marks_and_the_list_hold_whole_characters(scripts_page: Path) -> None:
    found = blocks(scripts_page)
    several = 0
    for latent, shown in found["piece-0-0"]["contexts"].items():
        for _, activation, *_, at, words, active, values in shown:
            texts = [found["piece-0-0"]["words"][word] for word in words]
            assert [c for text in texts for c in regex.findall(r"\X", text)] == regex.findall(r"\X", "".join(texts))
            assert texts[at] != ""
            assert values[active.index(at)] >= activation
            several += not texts[at].isascii()
        listed = found["list-0"]["words"][int(latent)].split("\n")
        assert sorted(found["list-0"]["on"][int(latent)], reverse=True) == found["list-0"]["on"][int(latent)]
        assert len(found["list-0"]["on"][int(latent)]) == len(listed)
        marked = {found["piece-0-0"]["words"][context[7][context[6]]].strip().lower() for context in shown}
        whole = {word for word in marked if word and "\ufffd" not in word}  # rows end within a character
        assert len(listed) == WORDS_LISTED or whole <= set(listed)
        assert not whole or "\ufffd" not in "".join(listed)
    assert several > 30
    effects = [text for tokens in found["piece-0-0"]["promoted"] for text, _ in tokens]
    assert "\ufffd" not in effects
    assert {"à", "¤"} & set(effects)  # bytes of Hindi, by the vocabulary's names for them


def test_names_that_would_act_where_they_are_shown_are_spelled_out(saes: Path, tmp_path: Path) -> None:
    name = "x\u202ey\x1b[31m" + os.fsdecode(b"\xff")  # turned round, coloured, and not UTF-8
    shutil.copytree(saes / "topk", tmp_path / "saes" / name)
    config = json.loads((tmp_path / "saes" / name / "cfg.json").read_text())
    ours = config["metadata"]["routesae"]
    ours["source"]["corpus"] = "\u2066corpus"
    config["metadata"]["routesae"] = signed(ours)
    (tmp_path / "saes" / name / "cfg.json").write_text(json.dumps(config))
    page = tmp_path / "report.html"
    write_report(ReportSettings(out=str(tmp_path / "saes"), html=str(page), device="cpu"))
    assert blocks(page)["shared"]["runs"][0]["name"] == "x<U+202E>y<U+001B>[31m<U+DCFF>"
    assert "&lt;U+2066&gt;corpus" in page.read_text()
    assert not re.search("[\x1b\u202e\u2066]", page.read_text())


# ----------------------------------------------------------------------------------------- wrong input


def change(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda out: {name: value.format(out=out) for name, value in changes.items()}


def swap_weights(out: Path) -> dict[str, Any]:
    retrain(out / "routesae")
    return {}


def cut_curve(out: Path) -> dict[str, Any]:
    path = out / "topk" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    return {}


def odd(file: str, content: Any) -> Callable[[Path], dict[str, Any]]:
    """Write a file below the SAEs: text, or a JSON object with its hash."""

    def prepare(out: Path) -> dict[str, Any]:
        if isinstance(content, str):
            (out / file).write_text(content)
        else:
            write_json(out / file, signed(content))
        return {"scores": str(out / file)} if file == "scores.json" else {}

    return prepare


def pipe(file: str) -> Callable[[Path], dict[str, Any]]:
    """Put a named pipe in the place of a file: who opens it without care waits for ever."""

    def prepare(out: Path) -> dict[str, Any]:
        (out / file).unlink(missing_ok=True)
        os.mkfifo(out / file)
        return {"scores": str(out / file)} if file == "scores.json" else {}

    return prepare


def odd_source(held_out: Any) -> Callable[[Path], dict[str, Any]]:
    def prepare(out: Path) -> dict[str, Any]:
        config = json.loads((out / "topk" / "cfg.json").read_text())
        ours = config["metadata"]["routesae"]
        ours["source"]["held_out"] = held_out
        config["metadata"]["routesae"] = signed(ours)
        (out / "topk" / "cfg.json").write_text(json.dumps(config))
        return {}

    return prepare


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (change(html="{out}/missing/report.html"), "there is no folder"),
        (change(html="{out}"), "is a folder or a device; give the name of a file"),
        (change(out="{out}/nothing"), "no SAE under"),
        (change(sae="{out}/topk", out="{out}/nothing"), "/nothing is where SAEs are looked for, and --sae "),
        (change(model="demo", **{"no-logits": ""}), "--model demo is for what --no-logits leaves out; leave one"),
        (change(scores="{out}/none.json"), "write it with routesae analyze --json"),
        (change(cache="{out}/none"), "is not a cache folder"),
        (odd("scores.json", '{"saes": []}'), "its hash is missing or differs"),
        (odd("scores.json", {"saes": [{"KLDiv": 1}]}), "scores.json cannot be read (saes.0.sae"),
        (odd("scores.json", {"saes": [{**ROW, "KLDiv": "1"}]}), "KLDiv '1' of topk is not a number"),
        (odd("scores.json", {"saes": [{**ROW, "KLDiv": [1]}]}), "scores.json cannot be read"),
        (odd("scores.json", '{"saes": NaN}'), "NaN is not a finite number"),
        (odd("scores.json", "[" * 10**5), "nested too deep"),
        (pipe("scores.json"), "not a regular file"),
        (odd("topk/metrics.jsonl", '{"tokens": 1}\n{"tokens": "many"}\n'), "metrics.jsonl cannot be read"),
        (odd("topk/metrics.jsonl", "[]"), "metrics.jsonl cannot be read (it is not what was written)"),
        (pipe("topk/metrics.jsonl"), "not a regular file"),
        (odd("routesae/interpretations.json", {"score": 1, "fuzzing": [1]}), "interpretations.json cannot be read"),
        (odd("routesae/interpretations.json", "[]"), "interpretations.json cannot be read"),
        (odd("routesae/interpretations.jsonl", '{"identity": {}}\n{"latent": "x"}\n'), "interpretations.jsonl"),
        (odd_source([1]), "cfg.json cannot be read"),
        (odd_source({"norm_mse": "low"}), "cfg.json cannot be read"),
        (swap_weights, "has other weights than its contexts; run routesae contexts again"),
        (cut_curve, "metrics.jsonl cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_page(
    saes: Path, tmp_path: Path, prepare: Callable[[Path], dict[str, Any]], told: str
) -> None:
    out = tmp_path / "saes"
    shutil.copytree(saes, out)
    page = tmp_path / "report.html"
    given = {"out": str(out), "html": str(page), "device": "cpu", **prepare(out)}
    flags = [part for name, value in given.items() for part in (f"--{name}", value) if part]
    result = CliRunner().invoke(main, ["report", *flags])
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("routesae: ")
    assert told in line
    assert list(tmp_path.glob("*.html*")) == list(tmp_path.glob(".*")) == []


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else real(name))
    with pytest.raises(WrongInput, match=r"needs jinja2: pip install 'routesae\[report\]'"):
        write_report(ReportSettings(out=str(saes), html=str(tmp_path / "report.html")))


def test_another_lm_than_the_caches_is_refused(saes: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0, "rms_norm_eps": 0.5}))
    with pytest.raises(WrongInput, match=r"is not the LM of the SAE .*: its config differs"):
        write_report(ReportSettings(out=str(saes), html=str(tmp_path / "r.html"), model=str(other), device="cpu"))


# ----------------------------------------------------------------------------------------- served, with own text


@pytest.fixture(scope="module")
def served(saes: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of the SAEs, served on a port that was free."""
    html = tmp_path_factory.mktemp("served") / "report.html"
    given = {"out": str(saes), "html": str(html), "model": str(tiny_model), "device": "cpu"}
    page = write_report(ReportSettings(**given, serve=True, port=0))
    assert page.server is not None
    threading.Thread(target=page.server.serve_forever, args=(0.05,), daemon=True).start()
    yield page
    page.server.shutdown()
    page.server.server_close()


def ask(page: Page, body: Any, **headers: str) -> tuple[int, Any]:
    assert page.server is not None
    connection = HTTPConnection("127.0.0.1", page.server.server_port, timeout=30)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", "/latents", sent, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def test_own_text_is_answered_by_what_the_sae_does_with_it(served: Page, saes: Path, tiny_model: Path) -> None:
    text = "the router reads a token of the hidden state"
    sae = load_sae(saes / "routesae", CPU)
    record = lm_of_sae(saes / "routesae", sae.recipe)
    expected = latents(load_lm_of([record], str(tiny_model), LMSettings(device="cpu")), sae, text, top=8)
    status, found = ask(served, {"run": 1, "text": text, "latent": 7})
    assert status == 200
    assert found["tokens"] == expected.tokens
    assert [[latent for latent, _ in of] for of in found["top"]] == [
        [row["latent"] for row in of] for of in expected.by_token()
    ]
    dense_nF = expected.latents.dense()
    assert [value for value, kept in zip(found["values"], expected.kept, strict=True) if kept] == pytest.approx(
        dense_nF[:, 7].tolist(), abs=1e-3
    )
    assert ask(served, {"run": 1, "text": text})[1]["values"] is None


def test_the_page_itself_is_served_and_nothing_else(served: Page) -> None:
    assert served.server is not None
    assert served.server.server_address[0] == "127.0.0.1"
    for path, status in (("/", 200), ("/latents", 404), ("/../../etc/passwd", 404), ("/cfg.json", 404)):
        connection = HTTPConnection("127.0.0.1", served.server.server_port, timeout=30)
        connection.request("GET", path)
        reply = connection.getresponse()
        assert (reply.status, reply.read() == served.path.read_bytes()) == (status, path == "/")
        assert reply.headers["Access-Control-Allow-Origin"] is None
        connection.close()
    assert "connect-src 'self'" in served.path.read_text()


@pytest.mark.parametrize(
    ("body", "headers", "told"),
    [
        ({"run": 1, "text": "x"}, {"Host": "evil.example"}, "only the page itself may ask"),
        ({"run": 1, "text": "x"}, {"Content-Type": "text/plain"}, "only the page itself may ask"),
        ({"run": 1, "text": "x"}, {"Content-Length": "1e9"}, "at most 65,536 bytes"),
        ({"run": 1, "text": "x" * 70_000}, {}, "at most 65,536 bytes"),
        (b"{", {}, "not JSON"),
        ([1], {}, "Question"),
        ({"run": 1, "text": ""}, {}, "text"),
        ({"run": 1, "text": "token " * 2000}, {}, "positions of"),
        ({"run": 2, "text": "x"}, {}, "no such SAE or latent"),  # it has no contexts, and is not shown
        ({"run": 1, "text": "x", "latent": LATENTS}, {}, "no such SAE or latent"),
        ({"run": -1, "text": "x"}, {}, "run"),
    ],
)
def test_odd_questions_are_refused(body: Any, headers: dict[str, str], told: str, served: Page) -> None:
    status, answer = ask(served, body, **headers)
    assert status == 400
    assert told in answer["error"]


def test_a_port_that_is_taken_is_named(served: Page) -> None:
    assert served.server is not None
    with pytest.raises(WrongInput, match=rf"--port {served.server.server_port}: .*; give another"):
        page_server(served.path, lambda question: {}, served.server.server_port)
