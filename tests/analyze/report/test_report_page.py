"""The report in a real Chromium: its latents are found, sorted and read by mouse and keys; hostile text stays text.

That it opens in under three seconds is benchmarks/report_page.py's to show; here only that what is not in sight is
not drawn. tests/browser.sh installs a Chromium where it can.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from routesae.analyze.inputs.saes import sae_identity
from routesae.analyze.report.run import write_report
from routesae.analyze.report.settings import ReportSettings
from routesae.machine.files import signed, write_json
from routesae.tests.analyze.interpret.chat_server import write_answer
from routesae.tests.made_up import write_made_up
from routesae.train.folder.checkpoint import load_sae, save_sae
from routesae.train.saes import Recipe, build
from routesae.train.saes.single import WEIGHTS

LATENTS, WIDTH = 5_000, 32  # more pieces than the page holds; benchmarks/report_page.py has 16,384
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WORDS = ("router", "layer", "token", "sparse", "latent", "shard", "row", "model")
HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "\u202eright to left\u202c",
    "zero\u200bwidth\u2060\ufeff",
    "مرحبا",
    "\ud83d\udc69\u200d\ud83d\udc67".encode("utf-16", "surrogatepass").decode("utf-16"),
    "line\nbreak\t\x07\ufff9",
    "{{ 7 * 7 }} &lt;b&gt;",
)
NAME = "<img src=x onerror=alert(1)> \u202ename"
HOSTILE_LATENT = 77


def token_classes(latent: int) -> list[str]:
    return [f"{WORDS[latent % 8]}{latent % 500}", WORDS[latent // 8 % 8]]


def contexts_of(latents: range) -> list[dict[str, Any]]:
    """Two contexts a latent, of three tokens; those of HOSTILE_LATENT made of HOSTILE."""
    rows = []
    for latent in latents:
        for rank, word in enumerate(token_classes(latent)):
            tokens = ["the ", word, " reads"] if latent != HOSTILE_LATENT else list(HOSTILE)
            strongest = float(latent % 97 + 3 - rank)
            rows.append(
                {
                    "latent": latent,
                    "kind": "top" if rank == 0 else "strong",
                    "rank": 0,
                    "token_class": word if latent != HOSTILE_LATENT else HOSTILE[rank],
                    "activation": strongest,
                    "layer": 4 + latent % 3,
                    "row": latent,
                    "position": 5,
                    "document": None,
                    "at": 1 if latent != HOSTILE_LATENT else rank,
                    "token_ids": list(range(len(tokens))),
                    "tokens": tokens,
                    "activations": [0.0 if len(tokens) == 3 else 1.0, strongest, strongest / 4]
                    + [0.0] * (len(tokens) - 3),
                }
            )
    return rows


def make_sae(folder: Path) -> None:
    """A routesae of LATENTS latents with contexts, scores, a curve and an explanation, none of them trained for."""
    recipe = Recipe(sae="routesae", layers=(4, 5, 6), width=WIDTH, latents=LATENTS, k=8)
    sae = build(recipe, torch.Generator().manual_seed(0))
    shares = {"4": 0.5, "5": 0.3, "6": 0.2}
    held_out = {"norm_mse": 0.1, "fvu": 0.2, "l0": 8.0, "dead": 0.01, "routing_entropy": 1.0, "layer_shares": shares}
    folder.mkdir(parents=True)
    save_sae(folder, sae, {"model": HOSTILE[0], "corpus": HOSTILE[1], "held_out": held_out})
    lines = [{"tokens": 1000 * n, "norm_mse": 1 / n, "l0": 8.0, "dead": 0.0} for n in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_answer(folder, HOSTILE_LATENT, explanation="Zebras. " + "".join(HOSTILE), score=5)
    at_F = np.arange(LATENTS)
    active_F = np.where(at_F == LATENTS - 1, 0, at_F % 1000 + 1)
    latents = {
        "latent": at_F,
        "active": active_F,
        "density": active_F / 100_000,
        "max_activation": np.where(active_F > 0, at_F % 97 + 3.0, 0.0),
        "mean_activation": np.where(active_F > 0, 1.0, 0.0),
        "token_classes": np.full(LATENTS, 2),
        "kept": at_F % 2 == 0,
    }
    rows = (contexts_of(range(first, min(first + 2048, LATENTS - 1))) for first in range(0, LATENTS, 2048))
    write_made_up(folder, rows, latents, sae=sae_identity(sae) | {"folder": str(folder)}, features=LATENTS // 2)


def make_plain(folder: Path) -> None:
    """A topk of 64 latents with a context each, on whose word latent n is active n + 1 times as strongly."""
    folder.mkdir()
    sae = build(Recipe(sae="topk", layers=(4,), width=WIDTH, latents=64, k=8), torch.Generator().manual_seed(1))
    save_sae(folder, sae, {"held_out": {"norm_mse": 0.3, "l0": 8.0}})
    at_F = np.arange(64)
    numbers = {"latent": at_F, "active": at_F + 1, "max_activation": at_F + 1.0, "mean_activation": at_F + 0.5}
    rows = contexts_of(range(64))
    for row in rows:
        row |= {"activation": row["latent"] + 1.0, "layer": 4}
    latents = {**numbers, "token_classes": np.full(64, 2), "kept": at_F % 2 == 1}
    write_made_up(folder, [rows], latents, sae=sae_identity(sae) | {"folder": str(folder)})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A report of two SAEs, with scores, and the logit effects of a tiny LM."""
    folder = tmp_path_factory.mktemp("report")
    make_sae(folder / "saes" / NAME)
    make_plain(folder / "saes" / "plain")
    rows = [
        {
            "sae": name,
            "folder": name,
            "variant": "topk",
            "NormMSE": value,
            "L0": 8.0,
            "intervals": {"NormMSE": [value - 0.01, value + 0.01]},
        }
        for name, value in ((NAME, 0.1), ("plain", 0.3))
    ]
    write_json(folder / "scores.json", signed({"saes": rows}))
    page = folder / "report.html"
    given = {"out": str(folder / "saes"), "html": str(page), "scores": str(folder / "scores.json")}
    write_report(ReportSettings(**given, model=str(tiny_model), device="cpu", contexts=4))
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.fail("no Chromium to look at the report with; apt-get install chromium, as tests/browser.sh does")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Seen:
    """What a page did that it must not: requests, dialogs, errors and words on the console."""

    def __init__(self, page: Page, url: str):
        self.wrong: list[str] = []
        page.on("request", lambda request: request.url.split("#")[0] == url or self.wrong.append(request.url))
        page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))


def opened(browser: Browser, report: Path, *, fragment: str = "", **context: Any) -> Iterator[Page]:
    given = browser.new_context(**{"viewport": DESK, "color_scheme": "light", "offline": True, **context})
    given.set_default_timeout(60_000)
    page = given.new_page()
    url = report.as_uri()
    seen = Seen(page, url)
    page.goto(url + fragment)
    page.wait_for_selector(".latent")
    yield page
    assert seen.wrong == []
    assert page.title() == "routesae report"
    given.close()


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report on a desk; afterwards it must have asked for nothing, said nothing and run nothing else."""
    yield from opened(browser, report)


@pytest.fixture
def phone(browser: Browser, report: Path) -> Iterator[Page]:
    yield from opened(browser, report, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)


def first_latents(page: Page, count: int = 5) -> list[int]:
    found = page.eval_on_selector_all(".latent", "rows => rows.map(row => Number(row.dataset.latent))")
    return found[:count]


def strongest_first(latents: range) -> list[int]:
    return sorted(latents, key=lambda latent: (-(latent % 97 + 3), latent))


def shown(page: Page) -> str:
    page.wait_for_selector("#detail .title")
    return page.inner_text("#detail")


# ----------------------------------------------------------------------------------------- the list


def test_only_rows_in_sight_are_drawn_wherever_the_list_stands(page: Page) -> None:
    assert page.inner_text("#count") == f"{LATENTS:,} latents"
    assert page.locator(".latent").count() < 60
    assert first_latents(page) == strongest_first(range(LATENTS))[:5]
    page.eval_on_selector("#list", "list => list.scrollTop = list.scrollHeight")
    page.wait_for_selector(f".latent[data-latent='{LATENTS - 1}']")  # never active: the last
    assert page.locator(".latent").count() < 60
    assert page.get_attribute(f".latent[data-latent='{LATENTS - 1}']", "aria-posinset") == str(LATENTS)


def test_search_finds_numbers_tokens_and_explanations(page: Page) -> None:
    page.fill("#search", "#2345")
    assert first_latents(page) == [2345]
    page.fill("#search", "12")
    assert first_latents(page, 1) == [12]  # and then every latent with a token such as layer12
    assert page.locator(".latent").count() > 1
    page.fill("#search", "ROUTER48")
    matching = [n for n in range(LATENTS - 1) if any("router48" in word for word in token_classes(n))]
    assert page.inner_text("#count") == f"{len(matching)} of {LATENTS:,}"
    page.fill("#search", '"router48"')
    exact = [n for n in matching if "router48" in token_classes(n)]
    assert page.inner_text("#count") == f"{len(exact)} of {LATENTS:,}"
    assert 0 < len(exact) < len(matching)
    page.fill("#search", "zebras")
    assert first_latents(page) == [HOSTILE_LATENT]
    page.fill("#search", "no such word")
    assert page.inner_text("#count") == f"0 of {LATENTS:,}"
    assert page.locator(".latent").count() == 0


def test_latents_sort_by_density_activation_layer_score_and_number(page: Page) -> None:
    active = range(LATENTS - 1)
    page.select_option("#sort", "density")
    assert first_latents(page) == sorted(active, key=lambda n: (-(n % 1000), n))[:5]
    page.click("#direction")
    assert first_latents(page, 1) == [LATENTS - 1]
    page.select_option("#sort", "layer")
    assert first_latents(page) == [0, 3, 6, 9, 12]
    page.select_option("#sort", "score")
    assert first_latents(page, 2) == [HOSTILE_LATENT, 0]
    page.select_option("#sort", "latent")
    assert first_latents(page) == [0, 1, 2, 3, 4]
    page.click(".head [data-key=max]")
    assert first_latents(page) == strongest_first(active)[:5]


# ----------------------------------------------------------------------------------------- one latent


def test_a_latent_shows_contexts_coloured_by_activation_effects_and_neighbours(page: Page) -> None:
    page.fill("#search", "#4242")
    page.click(".latent")
    text = shown(page)
    assert text.startswith("Latent 4242")
    assert page.locator("#detail .context").count() == 2
    assert page.inner_text("#detail h3 >> nth=1") == "Strongest"  # before all else of the latent
    assert page.locator(".histogram .bars span").count() == 3
    assert page.get_attribute(".histogram", "aria-label") == "Activations from 2 to 3.36, most between 2 and 2.38"
    assert page.inner_text(".context >> nth=0 >> p") == f"the {token_classes(4242)[0]} reads"
    found = page.eval_on_selector_all(".context p", "all => [...all[0].children].map(e => [e.className, e.title])")
    assert found == [["on at", str(4242 % 97 + 3)], ["on", f"{(4242 % 97 + 3) / 4:g}"]]
    strengths = page.eval_on_selector_all(
        ".context .on",
        "all => all.slice(0, 2).map(e => Number(getComputedStyle(e).backgroundColor.match(/([\\d.]+)\\)$/)[1]))",
    )
    assert strengths[0] == pytest.approx(0.82, abs=0.02)
    assert strengths[1] == pytest.approx(0.82 / 4, abs=0.02)
    assert page.locator(".effects .promoted li").count() == page.locator(".effects .suppressed li").count() == 10
    for row in page.locator(".effects li").all():
        bar, number = (row.locator(name).bounding_box() for name in ("> .bar", "> span"))
        assert bar is not None
        assert number is not None
        assert bar["x"] + bar["width"] <= number["x"], "bars do not cover their numbers"
    assert page.locator(".near >> nth=0 >> a").count() == 5
    nearest = page.inner_text(".near a .id >> nth=0")
    page.click(".near a >> nth=0")
    expect(page.locator("#detail h3").first).to_have_text(re.compile(f"Latent {nearest}\\b"))
    assert page.get_attribute(".latent[aria-selected=true]", "data-latent") == nearest


def test_a_latent_that_is_never_active_says_so(page: Page) -> None:
    page.fill("#search", f"#{LATENTS - 1}")
    page.click(".latent")
    assert "It is active on no token." in shown(page)


def test_a_link_opens_its_latent(browser: Browser, report: Path) -> None:
    for page in opened(browser, report, fragment="#latents/0/3000"):
        assert shown(page).startswith("Latent 3000")
        assert page.get_attribute(".latent[aria-selected=true]", "data-latent") == "3000"


def test_links_work_in_an_open_page_and_back_goes_back(page: Page) -> None:
    def at(latent: int | None) -> None:
        if latent is None:
            expect(page.locator("#detail .title")).to_have_count(0)
        else:
            expect(page.locator("#detail h3").first).to_have_text(re.compile(f"^Latent {latent}\\b"))
            expect(page.locator(f".latent[data-latent='{latent}'][aria-selected=true]")).to_be_visible()

    page.fill("#search", "no such word")
    page.evaluate("location.hash = '#latents/0/3000'")  # as a link or the address bar does
    at(3000)
    page.fill("#search", "#17")
    page.click(".latent")
    at(17)
    page.evaluate("location.hash = '#latents/0/99999'")  # there is none: nothing is open
    at(None)
    for latent in (17, 3000, None):
        page.go_back()
        at(latent)
    page.go_forward()
    at(3000)
    page.keyboard.press("Escape")
    at(None)
    page.go_back()
    at(3000)


def test_only_latents_that_the_rule_keeps_are_listed_where_that_is_asked(page: Page) -> None:
    page.check("#kept")
    assert page.inner_text("#count") == f"{LATENTS // 2:,} of {LATENTS:,}"
    assert first_latents(page) == strongest_first(range(0, LATENTS - 1, 2))[:5]
    page.fill("#search", "zebras")  # in what is said of latent 77
    assert page.locator(".latent").count() == 0


def test_search_goes_across_saes_and_puts_the_latents_strongest_on_the_word_first(page: Page) -> None:
    page.select_option("#run", "all")
    expect(page.locator("#count")).to_have_text(f"{LATENTS + 64:,} latents")  # once both SAEs are unpacked
    page.fill("#search", '"router40"')
    strongest = [(n % 97 + 3, 0, n) for n in range(40, LATENTS, 500) if n % 8 == 0] + [(41, 1, 40)]
    expected = [latent for _, _, latent in sorted(strongest, key=lambda one: (-one[0], one[1], one[2]))]
    assert first_latents(page, 99) == expected
    assert page.inner_text(".latent >> nth=0 >> .sorted") == str(max(strongest)[0])
    row = page.locator(".latent").nth(expected.index(40) if expected.count(40) == 1 else 0)
    assert row.locator("i").count() == 1  # whose it is
    page.click(
        f".latent >> nth={[one[1] for one in sorted(strongest, key=lambda one: (-one[0], one[1], one[2]))].index(1)}"
    )
    expect(page.locator("#detail h3").first).to_contain_text("plain")
    assert page.evaluate("location.hash") == "#latents/1/40"
    page.select_option("#run", "1")
    assert page.locator(".head [data-key=score], .head [data-key=layer]").count() == 0, "columns of nothing"


def test_latents_of_two_saes_are_paired_and_shown_side_by_side(page: Page, report: Path) -> None:
    W_dec, other_W_dec = (
        torch.nn.functional.normalize(
            load_sae(report.parent / "saes" / name, torch.device("cpu")).files()[WEIGHTS]["W_dec"]
        )
        for name in ("plain", NAME)
    )
    cosine_FF = W_dec @ other_W_dec.T
    page.select_option("#run", "1")
    page.select_option("#beside", "0")
    expect(page.locator(".head .sorted")).to_have_text("cosine")
    best = int(cosine_FF.amax(1).argmax())
    assert first_latents(page, 1) == [best]
    assert page.inner_text(".latent >> nth=0 >> .sorted") == f"{float(cosine_FF.max()):.2f}"
    page.click(".latent")
    other = int(cosine_FF[best].argmax())
    expect(page.locator("#detail .pane")).to_have_count(2)
    assert page.locator("#detail .title").all_inner_texts()[0].startswith(f"Latent {best}\n")
    assert page.locator("#detail .title").all_inner_texts()[1].startswith(f"Latent {other}\n")
    assert page.evaluate("location.hash") == f"#latents/1/{best}/0/{other}"
    page.click("#detail .title button >> nth=0")
    expect(page.locator("#detail .pane")).to_have_count(1)
    assert page.evaluate("location.hash") == f"#latents/0/{other}"
    page.click("#detail .near >> nth=1 >> a")  # the nearest in the other SAE
    expect(page.locator("#detail .pane")).to_have_count(2)


def test_keys_search_move_open_and_close(page: Page) -> None:
    order = strongest_first(range(LATENTS - 1))
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("jk")  # are letters here
    assert page.input_value("#search") == "jk"
    page.fill("#search", "")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.id") == "list"
    for key in ("j", "j", "ArrowDown", "k"):
        page.keyboard.press(key)
    assert page.get_attribute(".latent[aria-selected=true]", "data-latent") == str(order[2])
    page.keyboard.press("Enter")
    assert shown(page).startswith(f"Latent {order[2]}\n")
    page.keyboard.press("j")
    expect(page.locator("#detail h3").first).to_have_text(re.compile(f"Latent {order[3]}\\b"))
    page.keyboard.press("Escape")
    assert page.locator("#detail .title").count() == 0
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("End")
    page.wait_for_selector(f".latent[data-latent='{LATENTS - 1}'][aria-selected=true]")
    at = page.get_attribute("#list", "aria-activedescendant")
    assert page.get_attribute(f"#{at}", "data-latent") == str(LATENTS - 1)


# ----------------------------------------------------------------------------------------- hostile text


def test_hostile_text_is_shown_as_text_everywhere(page: Page) -> None:
    """The fixture sees to it that no script ran, no dialog opened and nothing was asked for."""
    page.fill("#search", f"#{HOSTILE_LATENT}")
    page.click(".latent")
    text = shown(page)
    for markup in (HOSTILE[0], HOSTILE[1], HOSTILE[7]):
        assert text.count(markup) >= 2  # in the explanation and in the contexts
        assert markup in page.text_content("#detail .context p")
    assert HOSTILE[0] in page.inner_text(".latent")
    assert HOSTILE[0] in page.inner_text(".facts")
    assert "<img src=x" in page.inner_text("#compare tbody")
    assert page.locator("img").count() == 0
    assert page.locator("main script").count() == 0


def test_characters_nobody_would_see_are_made_visible_and_turn_nothing_round(page: Page) -> None:
    page.fill("#search", f"#{HOSTILE_LATENT}")
    page.click(".latent")
    shown(page)
    text = page.text_content("#detail .context p")
    for hidden in ("\u202e", "\u202c", "\u200b", "\u2060", "\ufeff", "\n", "\t", "\x07", "\ufff9"):
        assert hidden not in text
    marks = page.eval_on_selector_all("#detail .context .invisible", "all => all.map(one => one.title)")
    assert set(marks) >= {"U+202E", "U+202C", "U+200B", "U+2060", "U+FEFF", "U+000A", "U+0009", "U+0007", "U+FFF9"}
    assert "مرحبا" in text
    assert page.eval_on_selector("#detail .context p", "text => getComputedStyle(text).unicodeBidi") == "plaintext"


@pytest.mark.parametrize("word", ["山", "\u304c", "नदी"[:1], "दी", "ม่", "👩\u200d👧", "❤\ufe0f", "🇮🇳"])
def test_characters_of_several_tokens_are_found_marked_and_shown_whole(
    browser: Browser, scripts_page: Path, word: str
) -> None:
    """Whether a letter and its mark are written as one (が) or as two."""
    for page in opened(browser, scripts_page):
        page.fill("#search", f'"{unicodedata.normalize("NFD", word)}"')
        page.click(".latent")
        shown(page)
        marks = page.locator(".context .at").all_text_contents()
        assert word in [mark.strip() for mark in marks]
        assert "" not in marks


# ----------------------------------------------------------------------------------------- the rest of the page


def test_runs_are_compared_and_sort_by_a_column(page: Page) -> None:
    def variants() -> list[str]:
        return page.eval_on_selector_all("#compare tbody tr", "rows => rows.map(row => row.cells[1].innerText)")

    assert variants() == ["routesae", "topk"]
    page.click("#compare thead button:text-is('NormMSE')")
    assert variants() == ["topk", "routesae"]
    page.click("#compare thead button:text-is('NormMSE')")
    assert variants() == ["routesae", "topk"]
    assert page.inner_text("#compare td.best") == "0.100"
    assert page.locator("#runs svg, #curves svg, #routing svg, #density svg").count() == 4
    assert page.locator("#run option").count() == 3  # both, and all


def test_light_and_dark_follow_the_system_until_switched(browser: Browser, report: Path) -> None:
    def paper(page: Page) -> int:
        """Sum of red, green and blue of the page's background."""
        colour = page.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    for scheme, dark in (("light", False), ("dark", True)):
        for page in opened(browser, report, color_scheme=scheme):
            assert (paper(page) < 200) == dark
            axis = "document.querySelector('#runs svg text')"
            before = page.evaluate(f"getComputedStyle({axis}).fill")
            page.click("#theme")
            assert (paper(page) < 200) != dark
            assert page.evaluate(f"getComputedStyle({axis}).fill") != before
            page.reload()
            page.wait_for_selector(".latent")
            assert (paper(page) < 200) != dark  # it is remembered


def test_a_phone_needs_no_sideways_scrolling_and_opens_a_latent_over_the_list(phone: Page) -> None:
    def too_wide() -> bool:
        return phone.evaluate("document.documentElement.scrollWidth > innerWidth")

    assert not too_wide()
    for inside in phone.locator(".top nav a, #compare td:visible, #compare th:visible").all():
        box = inside.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    phone.fill("#search", f"#{HOSTILE_LATENT}")
    phone.tap(".latent")
    shown(phone)
    assert not too_wide()
    assert phone.eval_on_selector("#detail", "one => one.scrollWidth <= one.clientWidth")
    box = phone.locator("#detail").bounding_box()
    assert box is not None
    assert (box["x"], box["y"], box["width"]) == (0, 0, PHONE["width"])
    phone.tap("#detail .title button")
    expect(phone.locator("#detail")).to_be_hidden()


def test_the_table_and_plots_need_no_script(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#compare tbody tr").count() == 2
    assert page.locator("figure svg").count() == 4
    context.close()


def test_own_text_is_coloured_as_it_is_typed(
    browser: Browser, report: Path, tiny_model: Path, tmp_path: Path
) -> None:
    given = {"out": str(report.parent / "saes"), "saes": (str(report.parent / "saes" / "plain"),), "device": "cpu"}
    made = write_report(
        ReportSettings(**given, html=str(tmp_path / "r.html"), model=str(tiny_model), serve=True, port=0)
    )
    assert made.server is not None
    threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True).start()
    with made.server, browser.new_page(viewport=DESK) as page:
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{made.server.server_port}/")
        page.wait_for_selector(".latent")
        page.fill("#text", "the router reads a token </script>")
        expect(page.locator("#tokens button").last).to_contain_text(">")
        assert "".join(page.locator("#tokens button").all_text_contents()) == "the router reads a token </script>"
        page.click("#tokens button >> nth=-1")
        latent = page.inner_text("#strongest a .id >> nth=0")
        value = page.inner_text("#strongest a .cosine >> nth=0")
        page.click("#strongest a >> nth=0")
        expect(page.locator("#detail h3").first).to_have_text(re.compile(f"^Latent {latent}\\b"))
        expect(page.locator("#tokens button").last).to_have_attribute("title", re.compile(rf"^{value.rstrip('0')}"))
        page.fill("#text", "")
        expect(page.locator("#tokens button")).to_have_count(0)
        made.server.shutdown()
        assert wrong == []
    for opened_from_disk in opened(browser, made.path):
        expect(opened_from_disk.locator("#own")).to_be_hidden()
