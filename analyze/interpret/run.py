"""The stage interpret: what `routesae contexts` found in; what a chat model makes of each latent out.

    contexts.parquet ──prompts──▶ chat model ──▶ interpretations.jsonl ──▶ interpretations.json, the summary
                                       └──▶ detection.jsonl, fuzzing.jsonl: does an explanation predict the latent?

Each answer is on the disk before the next question; a stopped run goes on where it stood, and asks nothing again that
was answered. What was under way at a `kill -9` may have been paid for without an answer: nobody can know.

The question is that of the RouteSAE paper (2503.08200, appendix): category, monosemanticity from 1 to 5, explanation.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from routesae import __version__
from routesae.analyze.contexts.file import Context, ContextsFile, read_contexts, read_facts
from routesae.analyze.interpret.answers import CATEGORIES, EXPLANATION_SCHEMA, parse_explanation
from routesae.analyze.interpret.asking import ANSWERED, UNANSWERED, UNPARSED, Asking, Question, bill, used_at_most
from routesae.analyze.interpret.chat import open_chat
from routesae.analyze.interpret.ledger import Ledger, read_lines
from routesae.analyze.interpret.prices import Budget, Price, Used, price_of
from routesae.analyze.interpret.scoring import Explained, Scoring, score_summary
from routesae.analyze.interpret.settings import MODES, ChatSettings, InterpretSettings
from routesae.machine.stop import StopRequest, stop_requests
from routesae.reporting import Report, WrongInput, silent

log = logging.getLogger(__name__)

FORMAT = 1
LINES, SUMMARY = "interpretations.jsonl", "interpretations.json"
BYTES_PER_TOKEN = 4.0  # of English, about; only for what is shown as an estimate
TYPICAL_ANSWER_TOKENS = 80


class Estimate(NamedTuple):
    """What is still to be asked. prompts: of each latent. used: tokens, about. dollars: None without a price."""

    prompts: dict[str, str]
    used: Used
    dollars: float | None

    def __str__(self) -> str:
        cost = "an unknown price; say it with --prices" if self.dollars is None else f"${self.dollars:.2f}"
        tokens = f"{self.used.input:,} tokens in and {self.used.output:,} out"
        return f"{len(self.prompts):,} prompts: about {tokens}, {cost}"


def interpret(settings: InterpretSettings, report: Report = silent) -> list[dict[str, Any]]:
    """Ask about every latent that has no answer yet; returns the summary of each SAE, as written beside it.

    Raises WrongInput where contexts, key or prompt are missing; FailedRun where the server ends it, or the budget;
    Stopped after Ctrl-C. What was answered is kept, and summed up, in each case.
    """
    settings.chat.key()  # before a file is begun
    price = _price(settings)
    budget = Budget(price, settings.max_cost)
    template = read_template(settings.prompt)
    with ExitStack() as stack:
        subjects = [
            stack.enter_context(Subject(folder, contexts, template, settings, price))
            for folder, contexts in _contexts(settings)
        ]
        for subject in subjects:
            for lines in subject.all_lines():
                budget.charge(used_at_most(lines))
        with stop_requests() as stop:
            asyncio.run(_ask_all(subjects, settings.chat, budget, stop, report))
        return [subject.summary() for subject in subjects]


def estimate(settings: InterpretSettings) -> Estimate:
    """The prompts that interpret would send, and about what they would cost. Asks nobody, and needs no key."""
    price, template = _price(settings), read_template(settings.prompt)
    prompts = {}
    for folder, contexts in _contexts(settings):
        path = folder / LINES
        there = read_interpretations(folder) if path.exists() and not settings.overwrite else {}
        wanted = set(pick(contexts, settings)) - settled(there.values(), settings)
        for latent in contexts.latents(wanted):
            prompts[f"{folder.name} latent {latent.latent}"] = prompt_of(template, latent.chosen, settings.examples)
    written = sum(len(prompt.encode()) for prompt in prompts.values())
    used = Used(round(written / BYTES_PER_TOKEN), TYPICAL_ANSWER_TOKENS * len(prompts))
    return Estimate(prompts, used, None if price is None else price.dollars(used))


def read_interpretations(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line of each latent asked about in an SAE's folder; none where interpret has not run.

    Raises WrongInput where the file is damaged.
    """
    path = folder / LINES
    if not path.exists():
        return {}
    return {line["latent"]: line for line in read_lines(path, path.read_bytes())[1]}


async def _ask_all(
    subjects: Sequence[Subject], chat_settings: ChatSettings, budget: Budget, stop: StopRequest, report: Report
) -> None:
    async with open_chat(chat_settings, budget) as chat:
        for subject in subjects:
            try:
                wanted = subject.unsettled()
                stage = f"interpret {subject.folder.name}"
                asking = Asking(chat, subject.ledger, stop, stage, len(wanted), report)
                await asking.ask(subject.questions(wanted))
                for scoring in subject.scorings:
                    questions = scoring.questions(subject.explained())
                    stage = f"{scoring.mode} {subject.folder.name}"
                    asking = Asking(chat, scoring.ledger, stop, stage, len(questions), report)
                    await asking.ask(iter(questions))
            finally:
                subject.write_summary()


class Subject:
    """One SAE whose latents are explained: its contexts, its ledgers, and what they come to."""

    def __init__(
        self, folder: Path, contexts: ContextsFile, template: str, settings: InterpretSettings, price: Price | None
    ):
        self.folder, self.contexts, self.template = folder, contexts, template
        self.settings, self.price = settings, price
        self.picked = pick(contexts, settings)
        self.identity = {
            "format": FORMAT,
            "model": settings.chat.model,
            "endpoint": settings.chat.endpoint(),
            "api_version": settings.chat.api_version,
            "temperature": settings.chat.temperature,
            "prompt": hashlib.sha256(template.encode()).hexdigest(),
            "contexts": contexts.fingerprint,
            "examples": settings.examples,
        }

    def __enter__(self) -> Subject:
        with ExitStack() as stack:
            overwrite = self.settings.overwrite
            self.ledger = stack.enter_context(Ledger(self.folder / LINES, self.identity, overwrite=overwrite))
            self.scorings = [
                stack.enter_context(
                    Scoring(
                        mode,
                        self.folder,
                        self.contexts,
                        self.identity,
                        cache=self.settings.cache,
                        device=self.settings.device,
                        seed=self.settings.seed,
                        examples=self.settings.examples,
                        retry_unparsed=self.settings.retry_unparsed,
                        overwrite=overwrite,
                    )
                )
                for mode in self.settings.scores
            ]
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def all_lines(self) -> Iterator[list[dict[str, Any]]]:
        """Of each ledger."""
        yield self.ledger.lines
        for scoring in self.scorings:
            yield scoring.ledger.lines

    def last_lines(self) -> dict[int, dict[str, Any]]:
        return {line["latent"]: line for line in self.ledger.lines}

    def unsettled(self) -> list[int]:
        """Latents still to be asked about, ascending."""
        return sorted(set(self.picked) - settled(self.last_lines().values(), self.settings))

    def questions(self, wanted: Collection[int]) -> Iterator[Question]:
        for latent in self.contexts.latents(wanted) if wanted else ():
            yield Question(
                line={"latent": latent.latent},
                prompt=prompt_of(self.template, latent.chosen, self.settings.examples),
                name="explanation",
                schema=EXPLANATION_SCHEMA,
                parse=lambda text: parse_explanation(text)._asdict(),
            )

    def explained(self) -> list[Explained]:
        last = self.last_lines()
        lines = [last[latent] for latent in sorted(self.picked) if latent in last]
        return [Explained(line["latent"], line["explanation"]) for line in lines if line["outcome"] == ANSWERED]

    def summary(self) -> dict[str, Any]:
        last = self.last_lines()
        asked = [last[latent] for latent in self.picked if latent in last]
        found: dict[str, Any] = {
            "routesae": __version__,
            "sae": self.folder.name,
            "identity": self.identity,
            "latents_kept": sum(one.kept for one in self.contexts.summaries),
            "not_asked": len(self.picked) - len(asked),
            **summarise(asked),
            **bill(self.ledger.lines, self.price),
        }
        for scoring in self.scorings:
            found[scoring.mode] = score_summary(scoring.ledger.lines, self.explained()) | bill(
                scoring.ledger.lines, self.price
            )
        return found

    def write_summary(self) -> None:
        """Put the summary beside the answers; whole or not at all."""
        partial = self.folder / f".{SUMMARY}.partial"
        partial.write_text(json.dumps(self.summary(), indent=2) + "\n")
        partial.replace(self.folder / SUMMARY)


# ------------------------------------------------------------------------------------- what is asked, and about what


def _contexts(settings: InterpretSettings) -> list[tuple[Path, ContextsFile]]:
    """The folders to work on, with their contexts; where none were named, those that have any."""
    if settings.saes:
        folders = [Path(sae) for sae in dict.fromkeys(settings.saes)]
        for folder in folders:
            if not folder.is_dir():
                raise WrongInput(f"--sae {folder} is no folder; give one that routesae contexts wrote into")
    else:
        from routesae.train.folder.checkpoint import find_saes  # brings torch

        everything = find_saes(Path(settings.out))
        folders = [folder for folder in everything if read_facts(folder) is not None]
        if not folders:
            raise WrongInput(f"no SAE under {settings.out} has contexts; make them with routesae contexts")
        if left := [folder.name for folder in everything if folder not in folders]:
            log.warning("left out, having no contexts: %s", ", ".join(left))
    return [(folder, read_contexts(folder)) for folder in folders]


def pick(contexts: ContextsFile, settings: InterpretSettings) -> list[int]:
    """The latents to ask about: of those that contexts chose, the first so many in a seeded order."""
    by_rule = contexts.facts["settings"]["top"] is None
    kept = [one.latent for one in contexts.summaries if (one.kept if by_rule else one.active)]
    if not kept:
        raise WrongInput(f"{contexts.folder}: no latent has contexts; run routesae contexts with a lower --threshold")
    random.Random(settings.seed).shuffle(kept)
    return kept[: settings.latents]


def settled(lines: Collection[Mapping[str, Any]], settings: InterpretSettings) -> set[int]:
    """Latents that are not asked about again: what came was an answer, be it one that made no sense."""
    paid = (ANSWERED,) if settings.retry_unparsed else (ANSWERED, UNPARSED)
    return {line["latent"] for line in lines if line["outcome"] in paid}


def read_template(prompt: str | None) -> str:
    """The user's prompt, or the packaged one. Raises WrongInput unless $examples is all that is to be filled in."""
    if prompt is None:
        return files("routesae.analyze.interpret").joinpath("prompts/explanation.txt").read_text(encoding="utf-8")
    try:
        template = Path(prompt).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongInput(f"--prompt {prompt} cannot be read: {error}") from None
    if not Template(template).is_valid():
        raise WrongInput(f"--prompt {prompt} has a $ that begins no name; write $$ for a dollar sign")
    names = Template(template).get_identifiers()
    if "examples" not in names:
        raise WrongInput(f"--prompt {prompt} has no $examples, where the latent's contexts go")
    if unknown := [name for name in names if name != "examples"]:
        raise WrongInput(f"--prompt {prompt} has ${unknown[0]}, which stands for nothing; write $$ for a dollar sign")
    return template


def prompt_of(template: str, contexts: Sequence[Context], examples: int) -> str:
    """The question about a latent with these contexts, strongest first, of which `examples` are shown."""
    shown = "\n".join(
        f"{number}. Token: {one_line(context.tokens[context.at])} | Activation: {context.activation:.2f} | "
        f"Context: {one_line(context.marked())}"
        for number, context in enumerate(contexts[:examples], 1)
    )
    return Template(template).substitute(examples=shown)


def one_line(text: str) -> str:
    """The text with its line breaks written out, so that it cannot look like a line of the prompt."""
    return text.replace("\r", "\\r").replace("\n", "\\n").strip()


def _price(settings: InterpretSettings) -> Price | None:
    model = settings.chat.model
    price = price_of(model, settings.prices)
    if price is None and settings.max_cost is not None:
        raise WrongInput(f"--max-cost: what {model} costs is not known; say it in a file for --prices")
    return price


# ------------------------------------------------------------------------------------------------ what it comes to


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and mean scores of the last lines of some latents, as the paper reports them.

    Scores are means over the latents that were explained; what did not parse counts as nothing but that.
    """
    explained = [line for line in lines if line["outcome"] == ANSWERED]
    by_category = {name: [line["score"] for line in explained if line["category"] == name] for name in CATEGORIES}
    return {
        "latents_asked": len(lines),
        "explained": len(explained),
        "unparsed": sum(line["outcome"] == UNPARSED for line in lines),
        "unanswered": sum(line["outcome"] == UNANSWERED for line in lines),
        "score": mean([line["score"] for line in explained]),
        "categories": {name: {"count": len(s), "score": mean(s)} for name, s in by_category.items()},
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def row_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a row of a table."""
    row = {"sae": summary["sae"], "kept": summary["latents_kept"]}
    row |= {name: summary[name] for name in ("explained", "unparsed", "unanswered")}
    row["score"] = summary["score"]
    for name, of in summary["categories"].items():
        row[name] = str(of["count"]) if of["score"] is None else f"{of['count']} ({of['score']:.2f})"
    for mode in MODES:
        if mode in summary:
            row[mode] = summary[mode]["balanced_accuracy"]
    bills = [summary, *(summary[mode] for mode in MODES if mode in summary)]
    row["tokens"] = f"{sum(one['input_tokens'] + one['output_tokens'] for one in bills):,}"
    costs = [one["cost_usd"] for one in bills]
    row["cost"] = None if None in costs else f"${sum(costs):.4f}"
    return row
