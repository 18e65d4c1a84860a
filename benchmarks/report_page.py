"""How fast the report opens, searches and scrolls in a headless Chromium, with 16,384 latents.

    python benchmarks/report_page.py                     # a made-up SAE of the default size
    python benchmarks/report_page.py --page report.html  # a page of your own

Each opening is a fresh browser profile, from disk. list_ms: from navigation to the first latents on the screen. The
made-up SAE has 22 contexts of 32 tokens a latent, as many as the report shows by default, of 5,000 different words.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from playwright.sync_api import Browser, sync_playwright

from routesae.analyze.contexts.file import FORMAT, KINDS, context_schema, latent_schema, write_contexts
from routesae.analyze.inputs.saes import sae_identity
from routesae.analyze.report.run import write_report
from routesae.analyze.report.settings import ReportSettings
from routesae.train.folder.checkpoint import save_sae
from routesae.train.saes import Recipe, build

OF_KIND = {"chosen": 4, "top": 12, "strong": 2, "middle": 2, "weak": 2}
WINDOW, VOCABULARY, WIDTH, BATCH = 32, 5000, 64, 512
SCROLL = """async () => {
  const list = document.getElementById("list"), frames = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < 120; i++) {
    list.scrollTop += 700;
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - last);
    last = now;
  }
  return frames;
}"""
SEARCH = """query => {
  const box = document.getElementById("search"), began = performance.now();
  box.value = query;
  box.dispatchEvent(new Event("input"));
  document.body.offsetHeight;
  return performance.now() - began;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = args.page or make_page(Path(folder), args.latents)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        rounds = [one_round(browser, page.resolve()) for _ in range(args.rounds)]
        told = {name: round(statistics.median(one[name] for one in rounds), 1) for name in rounds[0]}
        told |= {"list_ms_worst": max(one["list_ms"] for one in rounds), "megabytes": page.stat().st_size / 1e6}
        print(json.dumps({**told, "browser": browser.version, "load": round(os.getloadavg()[0], 1)}))
        browser.close()


def one_round(browser: Browser, path: Path) -> dict[str, float]:
    """Milliseconds of one opening and what is done in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(".latent")  # a function would be evaluated, which the page's policy forbids
    found = {"list_ms": page.evaluate("performance.getEntriesByName('routesae-list')[0].startTime")}
    found["paint_ms"] = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.wait_for_load_state()
    frames = page.evaluate(SCROLL)
    found |= {"frame_ms": statistics.median(frames), "frame_ms_99": sorted(frames)[-2]}
    found["search_ms"] = page.evaluate(SEARCH, "word12")
    page.evaluate(SEARCH, "")
    page.click(".latent >> nth=5")
    page.wait_for_selector("#detail .context")
    context.close()
    return found


def make_page(folder: Path, latents: int) -> Path:
    """A report of one topk that was never trained, with contexts of random words."""
    sae_folder = folder / "saes" / "made-up"
    sae_folder.mkdir(parents=True)
    recipe = Recipe(sae="topk", layers=(8,), width=WIDTH, latents=latents, k=64)
    sae = build(recipe, torch.Generator().manual_seed(0))
    save_sae(sae_folder, sae, {"held_out": {"norm_mse": 0.1, "l0": 64.0}})
    draw = np.random.default_rng(0)
    active = draw.integers(1, 10_000, latents)
    columns = {
        "latent": np.arange(latents),
        "active": active,
        "density": active / 1e6,
        "max_activation": draw.random(latents) * 30,
        "mean_activation": draw.random(latents),
        "token_classes": np.full(latents, 9),
        "kept": np.full(latents, True),
        "histogram_first": np.full(latents, -4),
        "histogram": list(draw.integers(0, 100, (latents, 24))),
    }
    schema = latent_schema()
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    facts = {
        "format": FORMAT,
        "settings": {"threshold": 4.0, "window": WINDOW, "per_class": 2, "min_contexts": 5, "choose": "rule"},
        "cache": {"path": "/nowhere", "corpus": "made up", "tokens_hash": "0"},
        "sae": {"folder": str(sae_folder), **sae_identity(sae)},
        "readings": 1_000_000,
        "features": latents,
        "chosen": latents,
    }
    starts = range(0, latents, BATCH)
    write_contexts(sae_folder, facts, table, (contexts(range(at, min(at + BATCH, latents)), draw) for at in starts))
    page = folder / "report.html"
    write_report(ReportSettings(out=str(folder / "saes"), html=str(page), device="cpu"))
    return page


def contexts(latents: range, draw: np.random.Generator) -> pa.RecordBatch:
    rows: list[dict[str, Any]] = []
    for latent in latents:
        for kind in KINDS:
            for rank in range(OF_KIND[kind]):
                ids = (VOCABULARY * draw.random(WINDOW) ** 3).astype(int)  # some words are much commoner, as in text
                activations = np.where(draw.random(WINDOW) < 0.1, draw.random(WINDOW) * 9, 0.0)
                activations[9] = 30.0 - rank
                rows.append(
                    {
                        "latent": latent,
                        "kind": kind,
                        "rank": rank,
                        "token_class": f"word{ids[9]}",
                        "activation": 30.0 - rank,
                        "layer": 8,
                        "row": latent,
                        "position": rank,
                        "document": 0,
                        "at": 9,
                        "token_ids": ids.tolist(),
                        "tokens": [f" word{token}" for token in ids.tolist()],
                        "activations": activations.tolist(),
                    }
                )
    return pa.RecordBatch.from_pylist(rows, context_schema())


if __name__ == "__main__":
    main()
