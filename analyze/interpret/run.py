"""Have a chat model explain latents from their contexts, and put the explanations to the test.

    contexts.parquet ──prompts──▶ chat model ──▶ interpretations.jsonl ──▶ interpretations.json, the summary
                                       └──▶ detection.jsonl, fuzzing.jsonl: does an explanation predict the latent?

Each answer is on the disk before the next question. A stopped run continues where it stood, and asks nothing again
that was answered. A request under way at a `kill -9` may have been paid for without an answer: nobody can know.

The question is that of the RouteSAE paper (2503.08200, appendix): category, monosemanticity from 1 to 5, explanation.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from routesae import __version__
from routesae.analyze.contexts.file import Context, ContextsFile, read_contexts, read_facts
from routesae.analyze.interpret.answers import CATEGORIES, Explanation, parse_explanation
from routesae.analyze.interpret.asking import ANSWERED, UNANSWERED, UNPARSED, Asking, Question, bill, settled, used
from routesae.analyze.interpret.chat import Chat, open_chat
from routesae.analyze.interpret.ledger import Line, open_ledger, read_lines
from routesae.analyze.interpret.prices import Budget, Price, Used, price_of
from routesae.analyze.interpret.scoring import (
    digest_of,
    one_line,
    score_summary,
    scoring_identity,
    scoring_questions,
    text_of,
    whole,
)
from routesae.analyze.interpret.settings import MODES, InterpretSettings
from routesae.machine.files import write_json
from routesae.machine.lock import hold
from routesae.machine.stop import StopRequest, stop_requests
from routesae.reporting import FailedRun, Report, WrongInput, silent

log = logging.getLogger(__name__)

FORMAT = 1
LINES, SUMMARY = "interpretations.jsonl", "interpretations.json"
BYTES_PER_TOKEN = 4.0  # of English, about; only for what is shown as an estimate
TYPICAL_ANSWER_TOKENS = 80


def interpret(settings: InterpretSettings, report: Report = silent) -> list[dict[str, Any]]:
    """Ask about every latent that has no answer yet. Returns the summary of each SAE, as written beside it.

    Raises WrongInput if contexts, key or prompt are missing; FailedRun if the server or the budget ends it; Stopped
    after Ctrl-C. In each case what was answered is kept and summed up. See `require_answers` for what was lost.
    """
    settings.key()  # before a file is begun
    budget = Budget(_price(settings), settings.max_cost)
    template = read_template(settings.prompt)
    with ExitStack() as stack:
        subjects = [Subject(stack, contexts, template, settings) for contexts in _contexts(settings)]
        for subject in subjects:
            for ledger in (subject.ledger, *subject.scores.values()):
                budget.spent += budget.dollars(used(ledger.lines))

        async def ask_all(stop: StopRequest) -> list[dict[str, Any]]:
            summaries = []
            async with open_chat(settings, budget) as chat:
                for subject in subjects:
                    try:
                        await subject.ask(chat, stop, report)
                    finally:
                        summaries.append(subject.write_summary(budget.price))
            return summaries

        with stop_requests() as stop:
            return asyncio.run(ask_all(stop))


def lost(summary: Mapping[str, Any]) -> int:
    """How many questions of a summary got no answer, those of its scores included."""
    return sum(part["unanswered"] for part in (summary, *(summary[mode] for mode in MODES if mode in summary)))


def require_answers(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Raises FailedRun if a question got no answer, although the run came to its end."""
    if count := sum(map(lost, summaries)):
        reason = next(summary["last_loss"] for summary in summaries if lost(summary))
        raise FailedRun(f"{count} questions got no answer ({reason}); the same command asks them again")


def estimate(settings: InterpretSettings) -> tuple[dict[str, str], str]:
    """The prompts that interpret would send, by latent, and about what they would cost. Asks nobody; needs no key."""
    price, template = _price(settings), read_template(settings.prompt)
    prompts = {}
    for contexts in _contexts(settings):
        lines = [] if settings.overwrite else list(read_interpretations(contexts.folder).values())
        done = settled(lines, ("latent",), settings)
        for latent in contexts.latents([latent for latent in pick(contexts, settings) if (latent,) not in done]):
            name = f"{contexts.folder.name} latent {latent.latent}"
            prompts[name] = prompt_of(template, latent.chosen[: settings.examples])
    written = sum(len(prompt.encode()) for prompt in prompts.values())
    tokens = Used(round(written / BYTES_PER_TOKEN), TYPICAL_ANSWER_TOKENS * len(prompts))
    cost = "an unknown price; give it with --prices" if price is None else f"${price.dollars(tokens):.2f}"
    return prompts, f"{len(prompts):,} prompts: about {tokens.input:,} tokens in and {tokens.output:,} out, {cost}"


def read_interpretations(folder: Path) -> dict[int, Line]:
    """The last line about each latent in an SAE's folder; empty if interpret has not run.

    Raises WrongInput if the file is damaged.
    """
    path = folder / LINES
    return {line["latent"]: line for line in read_lines(path, path.read_bytes())[1]} if path.exists() else {}


class Subject:
    """One SAE whose latents are explained: its contexts and its ledgers, which close with `stack`. scores: by mode.

    Raises WrongInput if another process has them, or they are about something else.
    """

    def __init__(self, stack: ExitStack, contexts: ContextsFile, template: str, settings: InterpretSettings):
        self.contexts, self.template, self.settings = contexts, template, settings
        self.picked = pick(contexts, settings)
        self.identity = {
            "format": FORMAT,
            **{name: getattr(settings, name) for name in ("model", "api_version", "temperature", "examples")},
            "endpoint": settings.endpoint(),
            "prompt": digest_of(template),
            "contexts": contexts.fingerprint,
        }
        folder = contexts.folder
        stack.enter_context(hold(folder / ".interpret.lock", str(folder / LINES)))
        self.ledger = stack.enter_context(open_ledger(folder / LINES, self.identity, settings.overwrite))
        self.scores = {}
        for mode in settings.scores:
            identity = {**self.identity, **scoring_identity(mode, settings.seed)}
            self.scores[mode] = stack.enter_context(
                open_ledger(folder / f"{mode}.jsonl", identity, settings.overwrite)
            )

    async def ask(self, chat: Chat, stop: StopRequest, report: Report) -> None:
        """Ask what has no answer yet, and put the explanations to the test."""
        name = self.contexts.folder.name
        done = settled(self.ledger.lines, ("latent",), self.settings)
        latents = [latent for latent in self.picked if (latent,) not in done]
        await Asking(chat, self.ledger, stop, report, f"interpret {name}", len(latents)).ask(self.questions(latents))
        for mode, ledger in self.scores.items():
            questions = scoring_questions(mode, self.contexts, self.explained(), ledger.lines, self.settings)
            await Asking(chat, ledger, stop, report, f"{mode} {name}", len(questions)).ask(iter(questions))

    def questions(self, latents: Sequence[int]) -> Iterator[Question]:
        for latent in self.contexts.latents(latents) if latents else ():
            prompts = shorter_and_shorter(self.template, latent.chosen[: self.settings.examples])
            yield Question({"latent": latent.latent}, prompts, Explanation, parse_explanation)

    def last_lines(self) -> dict[int, Line]:
        """The last line about each latent that was picked and asked about, in the order they were picked."""
        last = {line["latent"]: line for line in self.ledger.lines}
        return {latent: last[latent] for latent in self.picked if latent in last}

    def explained(self) -> dict[int, str]:
        """The explanations by latent, ascending."""
        lines = sorted(self.last_lines().items())
        return {latent: line["explanation"] for latent, line in lines if line["outcome"] == ANSWERED}

    def write_summary(self, price: Price | None) -> dict[str, Any]:
        """Sum the answers up in a file beside them, and return what it holds."""
        asked = list(self.last_lines().values())
        ledgers = (self.ledger, *self.scores.values())
        losses = [line["reason"] for ledger in ledgers for line in ledger.lines if line["outcome"] == UNANSWERED]
        summary: dict[str, Any] = {
            "routesae": __version__,
            "sae": self.contexts.folder.name,
            "identity": self.identity,
            "latents_kept": sum(one.kept for one in self.contexts.summaries),
            "not_asked": len(self.picked) - len(asked),
            **summarise(asked),
            **bill(self.ledger.lines, price),
            "last_loss": losses[-1] if losses else None,
        }
        for mode, ledger in self.scores.items():
            summary[mode] = score_summary(ledger.lines, self.explained()) | bill(ledger.lines, price)
        write_json(self.contexts.folder / SUMMARY, summary)
        return summary


# ------------------------------------------------------------------------------------- what is asked, and about what


def _contexts(settings: InterpretSettings) -> list[ContextsFile]:
    """The contexts of the SAEs that are named, or of all that have any; of the corpus of --cache if it is given."""
    tokens_hash = None
    if settings.cache is not None:
        from routesae.harvest.cache.reader import Cache

        tokens_hash = Cache(settings.cache).manifest.tokens_hash
    if settings.saes:
        folders = [Path(sae) for sae in dict.fromkeys(settings.saes)]
        for folder in folders:
            if not folder.is_dir():
                raise WrongInput(f"--sae {folder} is not a folder; give one that routesae contexts wrote into")
    else:
        from routesae.train.folder.checkpoint import find_saes  # brings torch

        everything = find_saes(Path(settings.out))
        folders = [folder for folder in everything if read_facts(folder, tokens_hash) is not None]
        if not folders:
            raise WrongInput(f"no SAE under {settings.out} has contexts; make them with routesae contexts")
        if left := [folder.name for folder in everything if folder not in folders]:
            log.warning("left out because they have no contexts: %s", ", ".join(left))
    return [read_contexts(folder, tokens_hash) for folder in folders]


def pick(contexts: ContextsFile, settings: InterpretSettings) -> list[int]:
    """The latents to ask about: of those that contexts chose, the first so many in a seeded order."""
    by_rule = contexts.facts["settings"]["choose"] == "rule"
    kept = [one.latent for one in contexts.summaries if (one.kept if by_rule else one.active)]
    if not kept:
        raise WrongInput(f"{contexts.folder}: no latent has contexts; run routesae contexts with a lower --threshold")
    random.Random(settings.seed).shuffle(kept)
    return kept[: settings.latents]


def read_template(prompt: str | None) -> str:
    """The user's prompt, or the packaged one. Raises WrongInput unless $examples is all that is to be filled in."""
    if prompt is None:
        return files("routesae.analyze.interpret").joinpath("prompts/explanation.txt").read_text(encoding="utf-8")
    try:
        template = Path(prompt).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongInput(f"--prompt {prompt} cannot be read: {error}") from None
    names = Template(template).get_identifiers() if Template(template).is_valid() else ["…"]
    if names != ["examples"]:
        others = ", ".join(f"${name}" for name in names if name != "examples")
        raise WrongInput(
            f"--prompt {prompt} has {others or 'no $examples'}; only $examples stands for something, the contexts; "
            "write $$ for a dollar sign"
        )
    return template


def prompt_of(template: str, contexts: Sequence[Context]) -> str:
    """The question about a latent with these contexts, strongest first."""
    shown = "\n".join(
        f"{number}. Token: {one_line(mark.text)} | Activation: {context.activation:.2f} | "
        f"Context: {text_of(context, mark)}"
        for number, context in enumerate(contexts, 1)
        for mark in [whole(context, context.at)]
    )
    return Template(template).substitute(examples=shown)


def shorter_and_shorter(template: str, contexts: Sequence[Context]) -> Iterator[str]:
    """The question with all contexts, then with half of them, and so on down to one."""
    while contexts:
        yield prompt_of(template, contexts)
        contexts = contexts[: len(contexts) // 2]


def _price(settings: InterpretSettings) -> Price | None:
    price = price_of(settings.model, settings.prices)
    if price is None and settings.max_cost is not None:
        raise WrongInput(f"--max-cost: the price of {settings.model} is not known; give it in a file for --prices")
    return price


# ------------------------------------------------------------------------------------------------ what it comes to


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """Counts and mean scores of the last lines of some latents, as the paper reports them.

    Scores are means over the latents that were explained.
    """
    explained = [line for line in lines if line["outcome"] == ANSWERED]
    scores = {name: [line["score"] for line in explained if line["category"] == name] for name in CATEGORIES}

    def mean(values: list[int]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "latents_asked": len(lines),
        "explained": len(explained),
        "unparsed": sum(line["outcome"] == UNPARSED for line in lines),
        "unanswered": sum(line["outcome"] == UNANSWERED for line in lines),
        "score": mean([line["score"] for line in explained]),
        "categories": {name: {"count": len(values), "score": mean(values)} for name, values in scores.items()},
    }


def row_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as a row of a table."""
    modes = [mode for mode in MODES if mode in summary]
    row = {"sae": summary["sae"], "kept": summary["latents_kept"]}
    row |= {name: summary[name] for name in ("explained", "unparsed", "unanswered", "score")}
    for name, of in summary["categories"].items():
        row[name] = str(of["count"]) if of["score"] is None else f"{of['count']} ({of['score']:.2f})"
    row |= {mode: summary[mode]["balanced_accuracy"] for mode in modes}
    bills = [summary, *(summary[mode] for mode in modes)]
    row["tokens"] = f"{sum(one['input_tokens'] + one['output_tokens'] for one in bills):,}"
    costs = [one["cost_usd"] for one in bills]
    return {**row, "cost": None if None in costs else f"${sum(costs):.4f}"}
