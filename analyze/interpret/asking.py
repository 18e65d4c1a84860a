"""Questions in, as many under way at once as was asked for; a line of a ledger for each answer out, as it comes.

What ends the asking early (Ctrl-C, SIGTERM, a key that is refused, a quota or budget used up) lets the requests that
are under way come home: they are paid for.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from routesae.analyze.interpret.answers import Unparsed
from routesae.analyze.interpret.chat import Answer, Chat
from routesae.analyze.interpret.ledger import Ledger
from routesae.analyze.interpret.prices import Price, Used
from routesae.machine.stop import StopRequest
from routesae.reporting import FailedRun, Progress, Report, Stopped

log = logging.getLogger(__name__)

ANSWERED, UNPARSED, UNANSWERED = "answered", "unparsed", "unanswered"
MAX_UNANSWERED_IN_A_ROW = 10  # then it is the server, not the question
STOP_POLL_SECONDS = 0.1


class Question(NamedTuple):
    """One request. line: what names it in the ledger. parse: the answer's text to what the line holds of it."""

    line: Mapping[str, Any]
    prompt: str
    name: str
    schema: Mapping[str, Any]
    parse: Callable[[str], Mapping[str, Any]]


def used(lines: list[dict[str, Any]]) -> Used:
    """Tokens that servers counted for the answers of these lines."""
    return Used(sum(line["input_tokens"] for line in lines), sum(line["output_tokens"] for line in lines))


def used_at_most(lines: list[dict[str, Any]]) -> Used:
    """The same with what may have been charged for tries that ended in silence."""
    lost = Used(sum(line["lost_input_tokens"] for line in lines), sum(line["lost_output_tokens"] for line in lines))
    counted = used(lines)
    return Used(counted.input + lost.input, counted.output + lost.output)


class Asking:
    """One stage of questions and where it stands."""

    def __init__(self, chat: Chat, ledger: Ledger, stop: StopRequest, stage: str, total: int, report: Report):
        self.chat, self.ledger, self.stop = chat, ledger, stop
        self.stage, self.total, self.report = stage, total, report
        self.done = self.unanswered_in_a_row = 0
        self.counts = dict.fromkeys((ANSWERED, UNPARSED, UNANSWERED), 0)
        self.used = used(ledger.lines)
        self.reason = ""  # of the last one that got no answer
        self.failure: FailedRun | None = None

    async def ask(self, questions: Iterator[Question]) -> None:
        """Ask all of them. Raises Stopped, or FailedRun, where not all could be asked; what came is in the ledger."""
        watcher = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.chat.settings.concurrency):
                    group.create_task(self._work(questions))
        finally:
            watcher.cancel()
        kept = f"{self.ledger.path} has what was answered"
        if self.failure is not None:
            raise self.failure
        if (asked_by := self.stop()) is not None:
            code = 130 if asked_by == signal.SIGINT else 0
            raise Stopped(f"stopped after {self.done} of {self.total}; {kept}; the same command goes on", code)
        if self.chat.budget.exhausted:
            limit, spent = self.chat.budget.max_dollars, self.chat.budget.spent
            raise FailedRun(
                f"--max-cost {limit} would be passed: ${spent:.4f} may be spent so far; {kept}; the same command "
                "with a larger one goes on"
            )
        if self.done and self.counts[UNANSWERED] == self.done:
            raise FailedRun(
                f"none of {self.done} questions got an answer, the last one: {self.reason}; the same command goes on"
            )

    async def _watch(self) -> None:
        while self.stop() is None:
            await asyncio.sleep(STOP_POLL_SECONDS)
        log.warning("stopping when the answers under way are there; they are paid for (once more: stop at once)")
        self.chat.stopping.set()

    async def _work(self, questions: Iterator[Question]) -> None:
        for question in questions:
            try:
                answer = await self.chat.ask(question.prompt, question.name, question.schema)
                if answer is None:
                    return
                self._take(question, answer)
            except FailedRun as failure:
                self.failure = self.failure or failure
                self.chat.stopping.set()
            if self.chat.stopping.is_set():
                return

    def _take(self, question: Question, answer: Answer) -> None:
        line = line_of(question, answer)
        self.ledger.add(line)
        self.counts[line["outcome"]] += 1
        self.done += 1
        self.used = Used(self.used.input + line["input_tokens"], self.used.output + line["output_tokens"])
        facts = {name: str(count) for name, count in self.counts.items() if count}
        if self.chat.budget.price is not None:
            facts["cost"] = f"${self.chat.budget.price.dollars(self.used):.4f}"
        self.report(Progress(self.stage, self.done, self.total, "questions", facts))
        if line["outcome"] != UNANSWERED:
            self.unanswered_in_a_row = 0
            return
        self.unanswered_in_a_row, self.reason = self.unanswered_in_a_row + 1, line["reason"]
        if self.unanswered_in_a_row >= MAX_UNANSWERED_IN_A_ROW:
            raise FailedRun(
                f"{self.unanswered_in_a_row} questions in a row got no answer, the last one: {self.reason}; "
                "the same command goes on"
            )


def line_of(question: Question, answer: Answer) -> dict[str, Any]:
    """What the ledger keeps of an answer: its text always, what it says only where it parses."""
    outcome, reason, says = ANSWERED, answer.problem, dict[str, Any]()
    if answer.text is None:
        outcome = UNANSWERED
    elif reason is None:
        try:
            says = dict(question.parse(answer.text))
        except Unparsed as error:
            reason = str(error)
    if answer.text is not None and reason is not None:
        outcome = UNPARSED
    return {
        **question.line,
        "outcome": outcome,
        **says,
        **({"reason": reason} if reason is not None else {}),
        "text": answer.text,
        "model": answer.model,
        "structured": answer.structured,
        "tries": answer.tries,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "lost_input_tokens": answer.lost_input_tokens,
        "lost_output_tokens": answer.lost_output_tokens,
        "answered_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def bill(lines: list[dict[str, Any]], price: Price | None) -> dict[str, Any]:
    """Tokens and dollars of a ledger, for its summary; dollars are None where no price is known."""
    counted, at_most = used(lines), used_at_most(lines)
    return {
        "input_tokens": counted.input,
        "output_tokens": counted.output,
        "cost_usd": None if price is None else price.dollars(counted),
        "cost_usd_at_most": None if price is None else price.dollars(at_most),
    }
