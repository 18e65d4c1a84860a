"""Have a chat model explain latents from their contexts, and put the explanations to the test.

    contexts.parquet ──prompts──▶ chat model ──▶ interpretations.jsonl ──▶ interpretations.json, the summary
                                       └──▶ detection.jsonl, fuzzing.jsonl: does an explanation predict the latent?

Each answer is on the disk before the next question. A stopped run continues where it stood, and asks nothing again
that was answered. A request under way at a `kill -9` may have been paid for without an answer: nobody can know.

The question is that of the RouteSAE paper (2503.08200, appendix): category, monosemanticity from 1 to 5, explanation.
"""

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from routesae import __version__
from routesae.analyze.contexts.file import Context, ContextsFile, read_contexts
from routesae.analyze.inputs.saes import sae_folders
from routesae.analyze.interpret import scoring
from routesae.analyze.interpret.answers import Explanation
from routesae.analyze.interpret.asking import Asking, Question, settled
from routesae.analyze.interpret.chat import Chat, open_chat
from routesae.analyze.interpret.ledger import ANSWERED, LINES, SUMMARY, UNANSWERED, Line, open_ledger, set_aside
from routesae.analyze.interpret.prices import Budget, Price, Used, price_of
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.analyze.interpret.summary import bill, read_interpretations, score_summary, summarise, used
from routesae.harvest.cache.reader import Cache
from routesae.machine.files import read_bytes, reading, signed, write_json
from routesae.machine.lock import hold
from routesae.machine.stop import StopRequest, stop_requests
from routesae.reporting import Report, WrongInput, silent

log = logging.getLogger(__name__)

FORMAT = 1
BYTES_PER_TOKEN = 4.0  # of English, about; only for what is shown as an estimate
TYPICAL_ANSWER_TOKENS = 80


def interpret(settings: InterpretSettings, report: Report = silent) -> list[dict[str, Any]]:
    """Ask about every latent that has no answer yet. Returns the summary of each SAE, as written beside it.

    Raises WrongInput if contexts, key or prompt are missing; FailedRun if server, budget or disk end it; Stopped
    after Ctrl-C. In each case what was answered is kept and summed up. See `require_answers` for what was not.
    """
    settings.key()  # before a file is begun
    budget = Budget(_price(settings), settings.max_cost)
    template = read_template(settings.prompt)
    with ExitStack() as stack:
        subjects = [Subject(stack, contexts, template, settings) for contexts in _contexts(settings)]
        budget.spent = sum(budget.dollars(used(ledger.lines)) for subject in subjects for ledger in subject.ledgers)

        async def ask_all(stop: StopRequest) -> list[dict[str, Any]]:
            summaries = []
            async with open_chat(settings, budget) as chat:
                for subject in subjects:
                    try:
                        await subject.ask(chat, stop, report)
                    except BaseException:
                        try:
                            subject.write_summary(budget.price)
                        except OSError as error:  # which must not hide what ended the run
                            log.warning("%s cannot be written: %s", subject.folder / SUMMARY, error)
                        raise
                    summaries.append(subject.write_summary(budget.price))
            return summaries

        with stop_requests() as stop:
            return asyncio.run(ask_all(stop))


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
    cost += f"; not counting --score {' and '.join(settings.scores)}, which asks later" if settings.scores else ""
    return prompts, f"{len(prompts):,} prompts: about {tokens.input:,} tokens in and {tokens.output:,} out, {cost}"


class Subject:
    """One SAE whose latents are explained: its contexts and its ledgers, which close with `stack`. scores: by mode.

    Raises WrongInput if another process has them, or they are about something else.
    """

    def __init__(self, stack: ExitStack, contexts: ContextsFile, template: str, settings: InterpretSettings):
        self.contexts, self.template, self.settings = contexts, template, settings
        self.folder, self.picked = contexts.folder, pick(contexts, settings)
        self.identity = {
            "format": FORMAT,
            **{name: getattr(settings, name) for name in ("model", "api_version", "temperature", "examples")},
            "endpoint": settings.endpoint(),
            "prompt": scoring.digest_of(template),
            "contexts": contexts.fingerprint,
        }
        stack.enter_context(hold(self.folder / ".interpret.lock", str(self.folder / LINES)))
        if settings.overwrite:
            set_aside(self.folder)
        self.ledger = stack.enter_context(open_ledger(self.folder / LINES, self.identity))
        self.scores = {}
        for mode in settings.scores:
            decisive = {f"{mode} prompt": scoring.digest_of(scoring.template_of(mode)), "seed": settings.seed}
            identity = {**self.identity, **decisive, **scoring.MADE_BY}
            self.scores[mode] = stack.enter_context(open_ledger(self.folder / f"{mode}.jsonl", identity))
        self.ledgers = (self.ledger, *self.scores.values())

    async def ask(self, chat: Chat, stop: StopRequest, report: Report) -> None:
        """Ask what has no answer yet, and put the explanations to the test."""
        done = settled(self.ledger.lines, ("latent",), self.settings)
        latents = [latent for latent in self.picked if (latent,) not in done]
        stage = f"interpret {self.folder.name}"
        await Asking(chat, self.ledger, stop, report, stage, len(latents)).ask(self.questions(latents))
        for mode, ledger in self.scores.items():
            questions = scoring.questions_of(mode, self.contexts, self.explained(), ledger.lines, self.settings)
            stage = f"{mode} {self.folder.name}"
            await Asking(chat, ledger, stop, report, stage, len(questions)).ask(iter(questions))

    def questions(self, latents: Sequence[int]) -> Iterator[Question]:
        for latent in self.contexts.latents(latents) if latents else ():
            shown = latent.chosen[: self.settings.examples]
            fewer = [shown[: len(shown) >> halved] for halved in range(len(shown).bit_length())]  # down to one
            yield Question({"latent": latent.latent}, map(partial(prompt_of, self.template), fewer), Explanation)

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
        losses = [line["reason"] for one in self.ledgers for line in one.lines if line["outcome"] == UNANSWERED]
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
            summary[mode] = score_summary(ledger.lines, scoring.digests_of(self.explained()))
            summary[mode] |= bill(ledger.lines, price)
        summary = signed(summary)
        write_json(self.folder / SUMMARY, summary)
        return summary


# ------------------------------------------------------------------------------------- what is asked, and about what


def _contexts(settings: InterpretSettings) -> list[ContextsFile]:
    """The contexts of the SAEs that are named, or of all that have any; of the corpus of --cache if it is given."""
    tokens_hash = None if settings.cache is None else Cache(settings.cache).manifest.tokens_hash
    found, without = list[ContextsFile](), list[str]()
    for name, (folder, beside) in sae_folders(settings.saes, Path(settings.out)).items():
        if folder == beside and not folder.is_dir():
            raise WrongInput(f"--sae {folder} is not a folder; give that of an SAE")
        if (contexts := read_contexts(beside, tokens_hash)) is not None:
            found.append(contexts)
        else:
            without.append(str(folder) if folder == beside else name)
    if without and (settings.saes or not found):
        which = "" if tokens_hash is None else " of that corpus"
        raise WrongInput(f"{without[0]} has no contexts{which}; make them with routesae contexts --sae {without[0]}")
    if without:
        log.warning("left out because they have no contexts: %s", ", ".join(without))
    return found


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
        return scoring.template_of("explanation")
    with reading(f"--prompt {prompt}", "give a file of text"):
        template = read_bytes(prompt).decode()
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
    shown = []
    for number, context in enumerate(contexts, 1):
        mark = scoring.whole(context, context.at)
        token, text = scoring.one_line(mark.text), scoring.text_of(context, mark)
        shown.append(f"{number}. Token: {token} | Activation: {context.activation:.2f} | Context: {text}")
    return Template(template).substitute(examples="\n".join(shown))


def _price(settings: InterpretSettings) -> Price | None:
    price = price_of(settings.model, settings.prices)
    if price is None and settings.max_cost is not None:
        raise WrongInput(f"--max-cost: the price of {settings.model} is not known; give it in a file for --prices")
    return price
