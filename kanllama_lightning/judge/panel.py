"""All questions about a head and its controls: what they would cost, and what came of them."""

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kanllama_lightning.judge.budget import Prices, estimate_tokens
from kanllama_lightning.judge.client import Answer, Judge, JudgeQuestion
from kanllama_lightning.judge.protocol import (
    PLACEHOLDER,
    Case,
    balanced_accuracy,
    detect_questions,
    explain_question,
    parse_explanation,
    parse_labels,
)

log = logging.getLogger(__name__)

HEAD, RANDOM, SHUFFLED = "head", "random directions", "shuffled explanations"
SUBJECTS = (HEAD, RANDOM, SHUFFLED)


class Verdict(NamedTuple):
    """What the judge made of a latent; a row of the table."""

    subject: str
    latent: int
    frequency: float
    category: str | None
    score: int | None
    explanation: str | None
    detection: float | None
    """Balanced accuracy; None, as category and score, if anything failed."""
    n_explain: int
    n_detect: int
    calls: int
    input_tokens: int | None
    output_tokens: int | None
    status: str
    """"ok", or what failed and why."""


class CallEstimate(NamedTuple):
    """What is still to be asked."""

    calls: int
    known: int
    """Calls that are on the disk, and cost nothing."""
    input_tokens: int
    output_tokens: int
    """Most that replies may have."""
    cost: float
    """USD, of the most."""

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls ({self.known:,} more are known), up to "
            f"{self.input_tokens:,} input and {self.output_tokens:,} output tokens, up to "
            f"{self.cost:.2f} USD"
        )


def estimate(
    judge: Judge | None,
    prices: Prices,
    max_tokens: int,
    cases: dict[str, Sequence[Case]],
    n_shuffled: int,
) -> CallEstimate:
    """What asking all of it may cost; rather too much.

    Args:
        judge: Knows what is on the disk; None: nothing is.
        prices: Of tokens.
        max_tokens: Longest reply.
        cases: Cases of the head and the random directions.
        n_shuffled: Latents of the head that get another's explanation.
    """
    questions: list[JudgeQuestion] = []
    known = 0
    explained: dict[int, str] = {}
    for subject, some in cases.items():
        for case in some:
            answer = judge.recall(explain_question(case), parse_explanation) if judge else None
            text = PLACEHOLDER
            if answer is None:
                questions.append(explain_question(case))
            else:
                known += 1
                if answer.value is None:
                    continue
                text = answer.value.text
                if subject == HEAD:
                    explained[case.latent] = text
            asked, there = _detection_left(judge, case, text, answer is not None)
            questions += asked
            known += there
    of_head = {case.latent: case for case in cases[HEAD]}
    whole = len(explained) == len(of_head)
    pairs = exchanged(list(of_head), n_shuffled) if len(of_head) > 1 else []
    for latent, other in pairs:
        text = explained.get(other, PLACEHOLDER)
        asked, there = _detection_left(judge, of_head[latent], text, whole)
        questions += asked
        known += there
    tokens = sum(estimate_tokens(q.messages, q.schema) for q in questions)
    most = max_tokens * len(questions)
    return CallEstimate(len(questions), known, tokens, most, prices.cost(tokens, most))


def _detection_left(
    judge: Judge | None, case: Case, text: str, final: bool
) -> tuple[list[JudgeQuestion], int]:
    """What is to be asked of a detection, and how much is known."""
    questions = detect_questions(case, text)
    if judge is None or not final:
        return questions, 0
    left = [q for q in questions if judge.recall(q, parse_labels(_size(q))) is None]
    return left, len(questions) - len(left)


def exchanged(latents: Sequence[int], n: int, seed: int = 0) -> list[tuple[int, int]]:
    """Latents, each with another whose explanation it gets; none gets its own, none serves twice.

    Args:
        latents: At least 2, in order.
        n: How many pairs at most.
        seed: Seed of the order.
    """
    order = list(latents)
    random.Random(f"{seed}:exchange").shuffle(order)
    return list(zip(order, order[1:] + order[:1], strict=True))[:n]


async def hear(judge: Judge, cases: dict[str, Sequence[Case]], n_shuffled: int,
               total: int) -> list[Verdict]:  # fmt: skip
    """Ask everything; verdicts in the order of the cases, those on shuffled explanations last.

    Args:
        judge: Whom; its `stopped` and `lost` say what is missing.
        cases: Cases of the head and the random directions.
        n_shuffled: Latents of the head that get another's explanation.
        total: Calls that are expected, for the progress bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("calls"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        hearing = _Hearing(judge, progress, total)
        every = [hearing.whole(subject, case) for subject, some in cases.items() for case in some]
        verdicts = list(await asyncio.gather(*every))
        explained = {
            v.latent: v.explanation
            for v in verdicts
            if v.subject == HEAD and v.explanation is not None
        }
        missing = any(v.explanation is None and judge_lost(v) for v in verdicts)
        of_head = {case.latent: case for case in cases[HEAD]}
        if len(explained) > 1 and not missing:
            again = [
                hearing.shuffled(of_head[latent], explained[other] or "")
                for latent, other in exchanged(list(explained), n_shuffled)
            ]
            verdicts += await asyncio.gather(*again)
    return verdicts


def judge_lost(verdict: Verdict) -> bool:
    """Whether it is incomplete because nobody answered, and would be complete another time."""
    return "no answer" in verdict.status or "not asked" in verdict.status


class _Hearing:
    """Questions about latents, with a progress bar."""

    def __init__(self, judge: Judge, progress: Progress, total: int) -> None:
        self.judge, self.progress = judge, progress
        self.bar = progress.add_task("asking the judge", total=total)

    async def whole(self, subject: str, case: Case) -> Verdict:
        """Explain, then detect."""
        answer = await self.judge.ask(explain_question(case), parse_explanation)
        self.progress.advance(self.bar)
        if answer.value is None:
            return _verdict(subject, case, [answer], None, None, f"explain: {answer.failure}")
        found = await self._detected(subject, case, answer.value.text, [answer])
        if found.detection is None:
            return found
        return found._replace(category=answer.value.category, score=answer.value.score)

    async def shuffled(self, case: Case, text: str) -> Verdict:
        """Detect by the explanation of another latent."""
        return await self._detected(SHUFFLED, case, text, [])

    async def _detected(
        self, subject: str, case: Case, text: str, before: Sequence[Answer]
    ) -> Verdict:
        answers = await asyncio.gather(*(self._labels(q) for q in detect_questions(case, text)))
        every = [*before, *answers]
        failures = [a.failure for a in answers if a.value is None]
        if failures:
            return _verdict(subject, case, every, text, None, f"detect: {failures[0]}")
        said = [label for a in answers for label in a.value or []]
        return _verdict(subject, case, every, text, balanced_accuracy(said, case.truth), "ok")

    async def _labels(self, question: JudgeQuestion) -> Answer[list[bool]]:
        answer = await self.judge.ask(question, parse_labels(_size(question)))
        self.progress.advance(self.bar)
        return answer


def _size(question: JudgeQuestion) -> int:
    """How many windows it is about."""
    size: int = question.schema["properties"]["labels"]["minItems"]
    return size


def _verdict(
    subject: str,
    case: Case,
    answers: Sequence[Answer],
    text: str | None,
    detection: float | None,
    status: str,
) -> Verdict:
    return Verdict(
        subject=subject,
        latent=case.latent,
        frequency=case.frequency,
        category=None,
        score=None,
        explanation=text,
        detection=detection,
        n_explain=len(case.explain),
        n_detect=len(case.detect),
        calls=sum(a.calls for a in answers),
        input_tokens=_sum([a.input_tokens for a in answers]),
        output_tokens=_sum([a.output_tokens for a in answers]),
        status=status,
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    """None if any is."""
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) else None
