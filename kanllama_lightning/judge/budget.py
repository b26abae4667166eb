"""What asking costs: an estimate before, a guard meanwhile."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BYTES_PER_TOKEN = 3
"""Fewer than tokens have on average, so that estimates are rather too high."""
PER_MESSAGE = 8
"""Tokens around each message."""


class Prices(NamedTuple):
    """USD per million tokens."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """In USD."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def estimate_tokens(messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> int:
    """Input tokens of a call, rather too many."""
    size = sum(len(m["content"].encode("utf-8", "replace")) for m in messages)
    size += len(json.dumps(schema))
    return -(-size // BYTES_PER_TOKEN) + PER_MESSAGE * (len(messages) + 1)


class Budget:
    """Lets no call go out with which the cost could exceed the limit.

    Args:
        limit: In USD.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.spent = 0.0
        """What answered calls cost, and what unanswered ones may have cost, in USD."""
        self._reserved: list[float] = []
        self._change = asyncio.Condition()

    async def reserve(self, cost: float) -> bool:
        """Set aside the most that a call may cost; False if that would be too much."""
        async with self._change:
            while self.spent + sum(self._reserved) + cost > self.limit:
                if not self._reserved:
                    return False
                await self._change.wait()
            self._reserved.append(cost)
            return True

    async def settle(self, reserved: float, cost: float) -> None:
        """What it did cost."""
        self._reserved.remove(reserved)
        self.spent += cost
        async with self._change:
            self._change.notify_all()
