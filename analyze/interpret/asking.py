"""Ask a list of questions, several at once, and put each answer into a ledger as it comes.

Whatever ends this early (Ctrl-C, SIGTERM, a key that is refused, a quota or budget used up, a full disk) first lets
the requests under way end: they are paid for.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from routesae.analyze.interpret.answers import Explanation, Predictions, Unparsed, parse
from routesae.analyze.interpret.chat import CUT_SHORT, Answer, Chat
from routesae.analyze.interpret.ledger import ANSWERED, UNANSWERED, UNPARSED, Ledger, Line
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.machine.stop import StopRequest, stop_code
from routesae.reporting import FailedRun, Progress, Report, Stopped

log = logging.getLogger(__name__)

MAX_LOST_IN_A_ROW = 10  # more than that is the server's or the settings' fault, not the questions'
STOP_POLL_SECONDS = 0.1
ROOM_BYTES, ROOM_BYTES_PER_TOKEN = 1 << 13, 32  # of an answer's line: what is always in it; its text, twice, escaped


class Question(NamedTuple):
    """One request. key: names it in the ledger. line: what else the ledger keeps of it.

    prompts: the prompt, and then shorter ones for servers that do not take it. expected: how many predictions.
    """

    key: Mapping[str, Any]
    prompts: Iterator[str]
    form: type[Explanation] | type[Predictions]
    expected: int | None = None
    line: Mapping[str, Any] = {}


class Asking:
    """Asks the questions of one stage."""

    def __init__(self, chat: Chat, ledger: Ledger, stop: StopRequest, report: Report, stage: str, total: int):
        self.chat, self.ledger, self.stop = chat, ledger, stop
        self.report, self.stage, self.total = report, stage, total
        self.counts = Counter[str]()
        self.lost_in_a_row = 0
        self.failure: FailedRun | None = None

    async def ask(self, questions: Iterator[Question]) -> None:
        """Ask them all. Raises Stopped or FailedRun if not all could be asked; the ledger has what was answered."""
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work(questions)) for _ in range(self.chat.settings.concurrency)]
            watcher = group.create_task(self._watch(workers))
            await asyncio.wait(workers)
            watcher.cancel()
        if self.failure is not None:
            raise self.failure
        kept = f"{self.ledger.path} has what was answered; the same command"
        if (request := self.stop()) is not None:
            done = self.counts.total()
            raise Stopped(f"stopped after {done} of {self.total}; {kept} continues", stop_code(request))
        if (budget := self.chat.budget).exhausted:
            raise FailedRun(
                f"--max-cost {budget.max_dollars} would be exceeded: ${budget.spent:.4f} may be spent so far; {kept} "
                "with a larger one continues"
            )

    async def _watch(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """On a stop, cancel the workers that only wait: for the next try, or for the budget."""
        while self.stop() is None and not self.chat.stopping:
            await asyncio.sleep(STOP_POLL_SECONDS)
        if self.stop() is not None:
            log.warning("stopping once the answers under way are here, since they are paid for; again: stop at once")
        self.chat.stopping = True
        for worker in workers:
            if worker not in self.chat.under_way:
                worker.cancel()

    async def _work(self, questions: Iterator[Question]) -> None:
        settings = self.chat.settings
        room = settings.concurrency * (ROOM_BYTES + ROOM_BYTES_PER_TOKEN * settings.max_output_tokens)
        for question in questions:
            try:
                self.ledger.reserve(room)
                answer = await self.chat.ask(question.prompts, question.form.model_json_schema())
                if answer is None:
                    return
                self._keep(question, answer)
            except FailedRun as failure:
                self.failure = self.failure or failure
                self.chat.stopping = True
            finally:
                self.chat.under_way.discard(asyncio.current_task())
            if self.chat.stopping:
                return

    def _keep(self, question: Question, answer: Answer) -> None:
        """Put the answer into the ledger: its text always, what it says only if it parses."""
        reason, says = answer.problem, dict[str, Any]()
        if answer.text is not None and reason is None:
            try:
                says = parse(question.form, answer.text, question.expected).model_dump()
            except Unparsed as error:
                reason = str(error)
        outcome = UNANSWERED if answer.text is None else ANSWERED if reason is None else UNPARSED
        line = {**question.key, **question.line, "outcome": outcome, "reason": reason, **says, **answer._asdict()}
        line |= {name: self.chat.clean(value) for name, value in line.items() if isinstance(value, str)}
        line["max_output_tokens"] = self.chat.settings.max_output_tokens
        del line["problem"]  # the reason says it
        self.ledger.add({**line, "answered_at": datetime.now(UTC).isoformat(timespec="seconds")})
        self.counts[outcome] += 1
        facts = {name: str(count) for name, count in self.counts.items()}
        if self.chat.budget.price is not None:
            facts["cost"] = f"${self.chat.budget.spent:.4f}"
        self.report(Progress(self.stage, self.counts.total(), self.total, "questions", facts))
        is_lost = outcome == UNANSWERED or reason == CUT_SHORT
        self.lost_in_a_row = self.lost_in_a_row + 1 if is_lost else 0
        if self.lost_in_a_row >= MAX_LOST_IN_A_ROW:
            raise FailedRun(f"{self.lost_in_a_row} answers in a row were lost, the last one: {line['reason']}")


def settled(lines: Sequence[Line], names: Sequence[str], settings: InterpretSettings) -> set[tuple[Any, ...]]:
    """Keys of the questions that need not be asked again: they got an answer, be it one that makes no sense.

    One that was cut short is asked again with a larger limit.
    """
    outcomes = (ANSWERED,) if settings.retry_unparsed else (ANSWERED, UNPARSED)
    return {
        tuple(line[name] for name in names)
        for line in lines
        if line["outcome"] in outcomes
        and not (line["reason"] == CUT_SHORT and line["max_output_tokens"] < settings.max_output_tokens)
    }
