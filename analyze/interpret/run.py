"""Have a chat model explain latents from their contexts, and put the explanations to the test.

    contexts.parquet ──prompts──▶ chat model ──▶ interpretations.jsonl ──▶ interpretations.json, the summary
                                       └──▶ detection.jsonl, fuzzing.jsonl: does an explanation predict the latent?

Each answer is on the disk before the next question. A stopped run continues where it stood, and asks nothing again
that was answered. A request under way at a `kill -9` may have been paid for without an answer: nobody can know.

The question is that of the RouteSAE paper (2503.08200, appendix): category, monosemanticity from 1 to 5, explanation.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from routesae import __version__
from routesae.analyze.contexts.file import Context, ContextsFile, read_contexts, read_facts
from routesae.analyze.interpret.answers import CATEGORIES, Explanation, parse_explanation
from routesae.analyze.interpret.asking import ANSWERED, UNANSWERED, UNPARSED, Asking, Question, bill, settled, used
from routesae.analyze.interpret.chat import Chat, open_chat
from routesae.analyze.interpret.examples import one_line
from routesae.analyze.interpret.ledger import Ledger, Line, open_ledger, read_lines
from routesae.analyze.interpret.prices import Budget, Price, Used, price_of
from routesae.analyze.interpret.scoring import Explained, score_summary, scoring_identity, scoring_questions
from routesae.analyze.interpret.settings import MODES, InterpretSettings
from routesae.machine.files import write_json
from routesae.machine.lock import hold
from routesae.machine.stop import StopRequest, stop_requests
from routesae.reporting import FailedRun, Report, WrongInput, silent

log = logging.getLogger(__name__)

FORMAT = 1
LINES, SUMMARY, LOCK = "interpretations.jsonl", "interpretations.json", ".interpret.lock"
KEY = ("latent",)  # what names a question in the ledger
BYTES_PER_TOKEN = 4.0  # of English, about; only for what is shown as an estimate
TYPICAL_ANSWER_TOKENS = 80


class Estimate(NamedTuple):
    """What is still to be asked. prompts: one a latent. used: tokens, about. dollars: None without a price."""

    prompts: dict[str, str]
    used: Used
    dollars: float | None

    def __str__(self) -> str:
        cost = "an unknown price; give it with --prices" if self.dollars is None else f"${self.dollars:.2f}"
        tokens = f"{self.used.input:,} tokens in and {self.used.output:,} out"
        return f"{len(self.prompts):,} prompts: about {tokens}, {cost}"


def interpret(settings: InterpretSettings, report: Report = silent) -> list[dict[str, Any]]:
    """Ask about every latent that has no answer yet. Returns the summary of each SAE, as written beside it.

    Raises WrongInput if contexts, key or prompt are missing; FailedRun if the server or the budget ends it; Stopped
    after Ctrl-C. In each case what was answered is kept and summed up. See `require_answers` for what was lost.
    """
    settings.key()  # before a file is begun
    price = _price(settings)
    budget = Budget(price, settings.max_cost)
    template = read_template(settings.prompt)
    with ExitStack() as stack:
        subjects = [Subject(stack, folder, contexts, template, settings) for folder, contexts in _contexts(settings)]
        for subject in subjects:
            for ledger in (subject.ledger, *subject.scores.values()):
                budget.charge(used(ledger.lines))

        async def ask_all(stop: StopRequest) -> list[dict[str, Any]]:
            summaries = []
            async with open_chat(settings, budget) as chat:
                for subject in subjects:
                    try:
                        await subject.ask(chat, stop, report)
                    finally:
                        summaries.append(subject.write_summary(price))
            return summaries

        with stop_requests() as stop:
            return asyncio.run(ask_all(stop))


def lost(summary: Mapping[str, Any]) -> int:
    """How many questions of a summary got no answer, those of its scores included."""
    parts = [summary, *(summary[mode] for mode in MODES if mode in summary)]
    return sum(part["unanswered"] for part in parts)


def require_answers(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Raises FailedRun if a question got no answer, although the run came to its end."""
    if count := sum(map(lost, summaries)):
        reason = next(summary["last_loss"] for summary in summaries if lost(summary))
        raise FailedRun(f"{count} questions got no answer ({reason}); the same command asks them again")


def estimate(settings: InterpretSettings) -> Estimate:
    """The prompts that interpret would send, and about what they would cost. Asks nobody, and needs no key."""
    price, template = _price(settings), read_template(settings.prompt)
    prompts = {}
    for folder, contexts in _contexts(settings):
        lines = [] if settings.overwrite else list(read_interpretations(folder).values())
        latents = set(pick(contexts, settings)) - {
            latent for (latent,) in settled(lines, KEY, settings.retry_unparsed)
        }
        for latent in contexts.latents(latents):
            prompts[f"{folder.name} latent {latent.latent}"] = prompt_of(template, latent.chosen, settings.examples)
    written = sum(len(prompt.encode()) for prompt in prompts.values())
    tokens = Used(round(written / BYTES_PER_TOKEN), TYPICAL_ANSWER_TOKENS * len(prompts))
    return Estimate(prompts, tokens, None if price is None else price.dollars(tokens))


def read_interpretations(folder: Path) -> dict[int, Line]:
    """The last line about each latent in an SAE's folder; empty if interpret has not run.

    Raises WrongInput if the file is damaged.
    """
    path = folder / LINES
    if not path.exists():
        return {}
    return {line["latent"]: line for line in read_lines(path, path.read_bytes())[1]}


class Subject:
    """One SAE whose latents are explained: its contexts and its ledgers, which close with `stack`. scores: by mode.

    Raises WrongInput if another process has them, or they are about something else.
    """

    def __init__(
        self, stack: ExitStack, folder: Path, contexts: ContextsFile, template: str, settings: InterpretSettings
    ):
        self.folder, self.contexts, self.template, self.settings = folder, contexts, template, settings
        self.picked = pick(contexts, settings)
        self.identity = {
            "format": FORMAT,
            "model": settings.model,
            "endpoint": settings.endpoint(),
            "api_version": settings.api_version,
            "temperature": settings.temperature,
            "prompt": hashlib.sha256(template.encode()).hexdigest(),
            "contexts": contexts.fingerprint,
            "examples": settings.examples,
        }

        def opened(name: str, **more: Any) -> Ledger:
            identity = {**self.identity, **more}
            return stack.enter_context(open_ledger(folder / name, identity, overwrite=settings.overwrite))

        stack.enter_context(hold(folder / LOCK, str(folder / LINES)))
        self.ledger = opened(LINES)
        self.scores = {
            mode: opened(f"{mode}.jsonl", **scoring_identity(mode, settings.seed)) for mode in settings.scores
        }

    async def ask(self, chat: Chat, stop: StopRequest, report: Report) -> None:
        """Ask what has no answer yet, and put the explanations to the test."""
        done = settled(self.ledger.lines, KEY, self.settings.retry_unparsed)
        latents = [latent for latent in self.picked if (latent,) not in done]
        asking = Asking(chat, self.ledger, stop, report, f"interpret {self.folder.name}", len(latents))
        await asking.ask(self.questions(latents))
        for mode, ledger in self.scores.items():
            questions = scoring_questions(
                mode, self.folder, self.contexts, self.explained(), ledger.lines, self.settings
            )
            asking = Asking(chat, ledger, stop, report, f"{mode} {self.folder.name}", len(questions))
            await asking.ask(iter(questions))

    def questions(self, latents: Sequence[int]) -> Iterator[Question]:
        for latent in self.contexts.latents(latents) if latents else ():
            yield Question(
                key={"latent": latent.latent},
                prompts=partial(shorter_and_shorter, self.template, latent.chosen, self.settings.examples),
                form=Explanation,
                parse=parse_explanation,
            )

    def last_lines(self) -> dict[int, Line]:
        """The last line about each latent that was picked and asked about, in the order they were picked."""
        last = {line["latent"]: line for line in self.ledger.lines}
        return {latent: last[latent] for latent in self.picked if latent in last}

    def explained(self) -> list[Explained]:
        lines = sorted(self.last_lines().items())
        return [Explained(latent, line["explanation"]) for latent, line in lines if line["outcome"] == ANSWERED]

    def write_summary(self, price: Price | None) -> dict[str, Any]:
        """Sum the answers up in a file beside them, and return what it holds."""
        asked = list(self.last_lines().values())
        everything = [line for ledger in (self.ledger, *self.scores.values()) for line in ledger.lines]
        losses = [line["reason"] for line in everything if line["outcome"] == UNANSWERED]
        summary: dict[str, Any] = {
            "routesae": __version__,
            "sae": self.folder.name,
            "identity": self.identity,
            "latents_kept": sum(one.kept for one in self.contexts.summaries),
            "not_asked": len(self.picked) - len(asked),
            **summarise(asked),
            **bill(self.ledger.lines, price),
            "last_loss": losses[-1] if losses else None,
        }
        for mode, ledger in self.scores.items():
            summary[mode] = score_summary(ledger.lines, self.explained()) | bill(ledger.lines, price)
        write_json(self.folder / SUMMARY, summary)
        return summary


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


def shorter_and_shorter(template: str, contexts: Sequence[Context], examples: int) -> Iterator[str]:
    """The question with `examples` contexts, then with half of them, and so on down to one."""
    examples = min(examples, len(contexts))
    while examples:
        yield prompt_of(template, contexts, examples)
        examples //= 2


def _price(settings: InterpretSettings) -> Price | None:
    model = settings.model
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

    def mean(scores: list[int]) -> float | None:
        return sum(scores) / len(scores) if scores else None

    return {
        "latents_asked": len(lines),
        "explained": len(explained),
        "unparsed": sum(line["outcome"] == UNPARSED for line in lines),
        "unanswered": sum(line["outcome"] == UNANSWERED for line in lines),
        "score": mean([line["score"] for line in explained]),
        "categories": {name: {"count": len(s), "score": mean(s)} for name, s in by_category.items()},
    }


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
