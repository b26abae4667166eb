"""The client of the judge: every question is asked once, whatever happens on the way."""

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import openai

from kanllama_lightning.judge.budget import Budget, Prices, estimate_tokens
from kanllama_lightning.judge.endpoint import Endpoint
from kanllama_lightning.judge.replies import ReplyCache
from kanllama_lightning.storage.small_files import from_json
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 2
"""Times that a question is asked until the answer can be used."""
TRUNCATED = "truncated"
MORE_ROOM = 4
"""How many times as long the second reply may be, if the first was cut off."""
MOST_TOKENS = 1 << 30
"""Tokens of one reply; a server that reports more has reported nonsense."""
LENGTHS = "list lengths"
"""Marks a server that supports JSON schemas but not minItems and maxItems."""
SCHEMAS = "json_schema"
"""Marks a server that knows response_format only by its older type, json_object."""
ADAPTABLE = ("temperature", "seed", "max_completion_tokens", "max_tokens", "response_format")
FILTERS = ("content_filter", "content_policy_violation")
"""Error codes that mean that a content filter blocked the request."""


class JudgeQuestion(NamedTuple):
    """One call."""

    messages: Sequence[Mapping[str, str]]
    name: str
    """Name of the schema."""
    schema: Mapping[str, Any]
    """What the answer has to look like."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of a question."""

    value: T | None
    """None if it failed."""
    failure: str | None
    """Why it failed, in a few words."""
    lost: bool
    """Whether nobody answered at all, so that it is worth asking again later."""
    calls: int
    """Replies received, now or earlier."""
    input_tokens: int | None
    """Tokens of all of them; None if the server does not say."""
    output_tokens: int | None


class JudgeSettings(NamedTuple):
    """How a judge is asked."""

    model: str
    max_tokens: int
    """Longest reply."""
    seed: int
    concurrency: int
    """Calls at once."""
    timeout: float
    """Seconds that the server may be silent."""
    retries: int
    """Repetitions of a call that got no answer; of one that was met with silence at most one."""


class _Closed(openai.OpenAIError):
    """Nothing more is sent; of a kind that the client of the library hands on at once."""


class _Call:
    """What a call may cost, in USD, and whether a try of it still has that set aside."""

    def __init__(self, most: float) -> None:
        self.most, self.open = most, False
        self.sent: Mapping[str, Any] = {}
        """Its parameters."""


CALL: ContextVar[_Call] = ContextVar("CALL")
"""The call that a request belongs to."""


class Judge:
    """Asks an LLM, with what was asked before read from the disk; never raises for a bad answer.

    Use as an async context manager.

    Args:
        endpoint: The server.
        manner: How it is asked.
        cache: Folder of replies.
        prices: Of tokens.
        max_cost: Most that the calls may cost together, in USD.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        manner: JudgeSettings,
        cache: Path,
        prices: Prices,
        max_cost: float,
    ) -> None:
        self.endpoint, self.manner, self.prices = endpoint, manner, prices
        self.cache = ReplyCache(cache)
        self.budget = Budget(max_cost)
        self.refused = self.cache.refused(endpoint.shown, manner.model)
        """Parameters that the server does not take."""
        self.stopped: InputError | None = None
        """Why nothing is asked any more."""
        self.lost: list[str] = []
        """Why calls got no answer, of each that got none."""
        self.asked = 0
        """Replies that came now, and not from the disk."""
        self._lost_in_a_row = 0
        self._met = False
        self._seen = False
        self._silent = False
        self._door = asyncio.Lock()
        self._places = asyncio.Semaphore(manner.concurrency)
        self._client = endpoint.client(
            manner.timeout, manner.retries, self._before_try, self._after_try
        )

    async def __aenter__(self) -> "Judge":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    def recall(self, question: JudgeQuestion, parse: Callable[[str], T]) -> Answer[T] | None:
        """The answer, if it is on the disk."""
        replies: list[Mapping[str, Any]] = []
        failure = None
        for attempt in range(ATTEMPTS):
            reply = self.cache.read(self._key(question, attempt, self._room(failure)))
            if reply is None:
                return None
            replies.append(reply)
            value, failure, final = _judged(reply, parse)
            if final:
                break
        return _answer(value, failure, replies)

    def _room(self, failure: str | None) -> int:
        """Most tokens of a reply, after one that failed."""
        return self.manner.max_tokens * (MORE_ROOM if failure == TRUNCATED else 1)

    async def ask(self, question: JudgeQuestion, parse: Callable[[str], T]) -> Answer[T]:
        """Ask, and once more if the answer cannot be used.

        Args:
            question: What.
            parse: Makes the value of the text; raises ValueError, in a few words, if it is none.
        """
        replies: list[Mapping[str, Any]] = []
        value, failure = None, None
        for attempt in range(ATTEMPTS):
            room = self._room(failure)
            kept = self.cache.read(self._key(question, attempt, room))
            reply = await self._wait_and_send(question, attempt, room) if kept is None else kept
            if isinstance(reply, str):
                return Answer(None, reply, True, len(replies), *_usage(replies))
            replies.append(reply)
            value, failure, final = _judged(reply, parse)
            self._look_at_first(reply, failure)
            if final:
                break
        return _answer(value, failure, replies)

    def _look_at_first(self, reply: Mapping[str, Any], failure: str | None) -> None:
        """Say once whether the schema binds the server, by the first reply that came now."""
        if self._seen or not self.asked:
            return
        if failure == TRUNCATED:
            # JSON, its fence or a thought that is cut off says nothing yet; other words do
            if str(reply.get("content") or "").lstrip()[:1] in ("", "{", "`", "<"):
                return
            failure = "its answer is no JSON"
        self._seen = True
        if failure is not None and "response_format" not in self.refused:
            log.warning(
                "the judge took the schema of the answer and does not keep to it (%s): replies "
                "that cannot be read are asked for once more, then left out. A server that binds "
                "its model to the schema loses none",
                failure,
            )

    def most(self, question: JudgeQuestion, room: int | None = None) -> float:
        """The most that one call may cost, in USD; `room`: most tokens of the reply."""
        tokens = estimate_tokens(question.messages, question.schema)
        return self.prices.cost(tokens, room or self.manner.max_tokens)

    def _wanted(self, question: JudgeQuestion, attempt: int, room: int) -> dict[str, Any]:
        """The parameters, before the server has said which it does not take."""
        schema = {"name": question.name, "strict": True, "schema": question.schema}
        return {
            "temperature": 0,
            "seed": self.manner.seed + attempt,
            "max_tokens": room,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _key(self, question: JudgeQuestion, attempt: int, room: int) -> str:
        # the address is left out: the same model answers alike wherever it is asked
        return ReplyCache.key(
            {
                "model": self.manner.model,
                "params": self._wanted(question, attempt, room),
                "messages": question.messages,
                "attempt": attempt,
            }
        )

    def _params(self, question: JudgeQuestion, attempt: int, room: int) -> dict[str, Any]:
        """The parameters that the server takes."""
        params = self._wanted(question, attempt, room)
        if "max_tokens" in self.refused:
            params["max_completion_tokens"] = params["max_tokens"]
        if SCHEMAS in self.refused:
            params["response_format"] = {"type": "json_object", "schema": question.schema}
        if LENGTHS in self.refused:
            params["response_format"] = _without_lengths(params["response_format"])
        return {name: value for name, value in params.items() if name not in self.refused}

    async def _wait_and_send(
        self, question: JudgeQuestion, attempt: int, room: int
    ) -> dict[str, Any] | str:
        """A reply, or why there is none; the first call goes alone, as the server may be down."""
        async with self._places:
            if not self._met:
                async with self._door:
                    if not self._met:
                        try:
                            return await self._send(question, attempt, room)
                        finally:
                            self._met = True
            return await self._send(question, attempt, room)

    async def _send(self, question: JudgeQuestion, attempt: int, room: int) -> dict[str, Any] | str:
        call = _Call(self.most(question, room))
        CALL.set(call)
        create: Any = self._client.chat.completions.with_raw_response.create
        patience = min(1, self.manner.retries)
        while True:
            call.sent = params = self._params(question, attempt, room)
            try:
                response = await create(
                    model=self.manner.model, messages=question.messages, **params
                )
                break
            except _Closed:
                return "not asked"
            except openai.APIConnectionError as e:
                unreached = type(e.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
                await self._settle(call, 0.0 if unreached else call.most)
                silent = isinstance(e, openai.APITimeoutError) and not unreached
                if silent:
                    self._hint_at_silence()
                    if patience:
                        patience -= 1
                        continue
                why = f"no reply in {self.manner.timeout:g} s" if silent else "connection broke off"
                return self._lose("no connection" if unreached else why, unreached)
            except openai.APIStatusError as e:
                if self._adapt(e, params, self._params(question, attempt, room)):
                    continue
                if e.code in FILTERS:
                    return {"failure": "refused"}
                if _other_model(e):
                    self._stop(self._explained(e))
                    return "not asked"
                if e.status_code in (400, 413, 422):
                    log.warning("the judge does not take a question (%s)", _code(e))
                    return {"failure": f"not taken ({_code(e)})"}
                passing = e.status_code in (408, 409, 429) or e.status_code >= 500
                if passing and "insufficient_quota" not in (e.code, e.type):
                    return self._lose(f"answer {e.status_code}")
                self._stop(self._explained(e))
                return "not asked"
        # before and after its escapes are resolved
        reply: dict[str, Any] = self.endpoint.scrubbed(
            _envelope(self.endpoint.scrubbed(response.text))
        )
        used = _usage([reply])
        cost = call.most if None in used else self.prices.cost(used[0] or 0, used[1] or 0)
        await self._settle(call, cost)
        self.cache.write(self._key(question, attempt, room), _record(self, question, params), reply)
        self.asked += 1
        self._lost_in_a_row = 0
        return reply

    def _hint_at_silence(self) -> None:
        """Name the options that help, once."""
        if not self._silent:
            self._silent = True
            log.warning(
                "the judge gave no reply in %g s; a slow server is given more by "
                "--interpretability.timeout SECONDS, or fewer calls at once by "
                "--interpretability.concurrency",
                self.manner.timeout,
            )

    async def _before_try(self, _request: object) -> None:
        """Let a try go out, repetitions too, unless all is stopped or it could cost too much."""
        call = CALL.get()
        await self._settle(call, call.most)  # the server may count one that got no reply
        call.open = self.stopped is None and await self.budget.reserve(call.most)
        if not call.open:
            self._stop(
                f"interpretability.max_cost={self.budget.limit}: the next call could exceed it "
                f"({self.budget.spent:.4f} USD are spent); what came is kept, the same command "
                "with a higher --interpretability.max_cost goes on from there"
            )
        if self.stopped is not None:
            await self._settle(call, 0.0)
            raise _Closed

    async def _after_try(self, response: Any) -> None:
        """See that a try which the server turned away costs nothing; nor is it made twice.

        Some servers answer 500 to a parameter that they do not know: sending it again is no use.
        """
        if response.is_success:
            return
        call = CALL.get()
        await self._settle(call, 0.0)
        if response.status_code >= 500:
            await response.aread()
            if _objected(response.status_code, response.text, call.sent):
                response.headers["x-should-retry"] = "false"

    async def _settle(self, call: _Call, cost: float) -> None:
        if call.open:
            call.open = False
            await self.budget.settle(call.most, cost)

    def _adapt(
        self, error: openai.APIStatusError, sent: Mapping[str, Any], now: Mapping[str, Any]
    ) -> bool:
        """Leave out the parameter that the server objects to, from now on; False if it is none.

        Args:
            error: What it answered.
            sent: The parameters then.
            now: What they are now, if another call has met this meanwhile.
        """
        text = error.response.text
        named = _objected(error.status_code, text, sent, str(error.param or ""))
        if named is None or now != sent:
            return named is not None
        name = named
        if name == "response_format":
            older = sent[name]["type"] == "json_schema" and "json_object" in text
            steps = (SCHEMAS,) if older else (LENGTHS, SCHEMAS, name)
            name = next(step for step in steps if step not in self.refused)
        self.refused.add(name)
        self.cache.refuse(self.endpoint.shown, self.manner.model, self.refused)
        instead = "asked as json_object" if name == SCHEMAS else "left out"
        log.warning("the judge does not take %s: %s from now on", name, instead)
        return True

    def _explained(self, error: openai.APIStatusError) -> str:
        where, status = self.endpoint.shown, error.status_code
        if status == 404 or _other_model(error):
            problem = (
                f"interpretability.model={self.manner.model!r}: {where} does not know it, or is "
                f"no such place ({status}); check --interpretability.model (what the server calls "
                "its model) and --interpretability.base_url"
            )
        elif status in (401, 403):
            problem = (
                f"OPENAI_API_KEY: {where} does not accept it ({status}); set one that may use "
                f"{self.manner.model!r}"
            )
        elif status == 429:
            problem = (
                f"OPENAI_API_KEY: its quota at {where} is used up (insufficient_quota); raise it, "
                "or take another key"
            )
        else:
            problem = f"interpretability.base_url={where!r}: answers {status} ({_code(error)})"
        return f"{problem}; what came before is kept, the same command goes on from there"

    def _stop(self, problem: str) -> None:
        if self.stopped is None:
            self.stopped = InputError(problem)

    def _lose(self, reason: str, unreached: bool = False) -> str:
        """Count a call that nobody answered; give up if that goes for all."""
        self.lost.append(reason)
        self._lost_in_a_row += 1
        nobody = unreached and not self.asked
        if nobody or self._lost_in_a_row >= max(3, 2 * self.manner.concurrency):
            slow = " and needs no more than --interpretability.timeout" * self._silent
            self._stop(
                f"interpretability.base_url={self.endpoint.shown!r}: {len(self.lost)} calls got no "
                f"answer ({reason}); see that the server runs there{slow}; what came before is "
                "kept, the same command goes on from there"
            )
        return f"no answer ({reason})"


def _record(judge: Judge, question: JudgeQuestion, params: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, for people."""
    about = {"url": judge.endpoint.shown, "model": judge.manner.model}
    return about | dict(params) | {"messages": list(question.messages)}


def _envelope(text: str) -> dict[str, Any]:
    """What counts of a reply, still unread."""
    try:
        body = from_json(text)
        choice = body["choices"][0]
        message = choice["message"]
        refusal = message.get("refusal")
        content = message.get("content")
        reply = {
            "content": content if isinstance(content, str) else None,
            "refusal": str(refusal) if refusal else None,
            "finish_reason": choice.get("finish_reason"),
            "model": body.get("model"),
            "usage": body.get("usage"),
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {"body": text}
    return reply


def _judged(
    reply: Mapping[str, Any], parse: Callable[[str], T]
) -> tuple[T | None, str | None, bool]:
    """Value, why there is none, and whether asking again is no use."""
    if "failure" in reply:
        return None, str(reply["failure"]), True
    if reply.get("refusal") or reply.get("finish_reason") == "content_filter":
        return None, "refused", True
    if reply.get("finish_reason") == "length":
        return None, TRUNCATED, False
    content = reply.get("content")
    if not isinstance(content, str):
        return None, "no text", False
    try:
        return parse(content), None, True
    except ValueError as e:
        return None, str(e), False


def _answer(
    value: T | None, failure: str | None, replies: Sequence[Mapping[str, Any]]
) -> Answer[T]:
    real = [r for r in replies if "failure" not in r]
    return Answer(value, failure, False, len(real), *_usage(real))


def _usage(replies: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """Input and output tokens of replies; None where a server does not say."""
    used = [r.get("usage") for r in replies]
    sums: list[int | None] = []
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [u.get(name) if isinstance(u, dict) else None for u in used]
        whole = [c for c in counts if type(c) is int and 0 <= c <= MOST_TOKENS]
        sums.append(sum(whole) if len(whole) == len(counts) else None)
    return sums[0], sums[1]


def _code(error: openai.APIStatusError) -> str:
    """What a server calls a problem, if it is a plain word."""
    code = error.code or ""
    return code if re.fullmatch(r"[a-z_]{1,40}", code) else str(error.status_code)


def _objected(status: int, text: str, sent: Mapping[str, Any], param: str = "") -> str | None:
    """The parameter that an error is about, of those sent; None if it is about none of them.

    Args:
        status: Of the error; a server that broke down objects to what it names alone.
        text: The body of the error.
        sent: The parameters.
        param: What the server says it is about.
    """
    if status not in (400, 422) and status < 500:
        return None
    words = set(re.findall(r"\w+", re.sub(r"\\[nrt]", " ", text)))
    if words & {"json_schema", "json_object"}:
        words.add("response_format")
    first = [name for name in ADAPTABLE if name in sent and param.startswith(name)]
    named = first or [name for name in ADAPTABLE if name in sent and name in words]
    return named[0] if named and (status < 500 or len(named) == 1) else None


def _other_model(error: openai.APIStatusError) -> bool:
    """Whether the server has another model than the one asked for (transformers: "pinned to")."""
    wrong = error.param == "model" or error.code == "model_not_found"
    return error.status_code == 400 and (wrong or "is pinned to" in error.response.text)


def _without_lengths(value: Any) -> Any:
    """A schema that does not say how long lists are."""
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if k not in ("minItems", "maxItems")}
        return {k: _without_lengths(v) for k, v in left.items()}
    return value
