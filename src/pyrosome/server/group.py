"""Several exchanges that answer one request, as one: for a request with several prompts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence

from pyrosome.server.exchange import Exchange, Said, StillHere
from pyrosome.server.problems import Problem


class Group:
    """What `Reply` takes an exchange for.

    Each prompt is admitted, computed and written to the ledger by itself; when one fails, all end.  Completions are
    numbered prompt by prompt.
    """

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = exchanges
        self._first = exchanges[0]
        self.id, self.error_shape = self._first.id, self._first.error_shape
        self.asked, self.outcome = self._first.asked, self._first.outcome
        self._pumps: list[asyncio.Task[None]] = []

    @property
    def is_shutting_down(self) -> bool:
        """Whether the server ended it."""
        return any(e.is_shutting_down for e in self.exchanges)

    @property
    def write_s(self) -> float:
        """How long its client may not read what is sent."""
        return min(e.write_s for e in self.exchanges)

    @property
    def keep_alive_s(self) -> float:
        """Seconds between two signs of life."""
        return self._first.keep_alive_s

    @property
    def num_logprobs(self) -> int:
        """Tokens whose log probabilities are part of the answers."""
        return sum(e.num_logprobs for e in self.exchanges)

    @property
    def limit_headers(self) -> Mapping[str, str]:
        """What is left of the caller's limits, all prompts counted."""
        return self.exchanges[-1].limit_headers

    async def open(self) -> None:
        """Have all of them admitted and taken.

        Raises:
            Refused, RequestError: one was not; no other goes on.
        """
        tasks = [asyncio.create_task(e.open()) for e in self.exchanges]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await _ended(tasks)
            await self.close()
            raise

    async def batches(self) -> AsyncIterator[list[Said] | StillHere]:
        """What is said, as it comes.  While several wait, one of them says so.

        Raises:
            EngineError, Refused: as `Exchange.batches`; the others are ended.
        """
        came: asyncio.Queue[tuple[int, list[Said] | StillHere | BaseException | None]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(_pump(n, e, came)) for n, e in enumerate(self.exchanges)]
        left = set(range(len(self._pumps)))
        while left:
            number, batch = await came.get()
            if batch is None:
                left.remove(number)
            elif isinstance(batch, BaseException):
                await self._fail(number)
                raise batch
            elif not isinstance(batch, StillHere):
                first = number * len(self.asked.readers)
                yield [dataclasses.replace(s, index=first + s.index) for s in batch]
            elif number == min(left):
                yield batch

    def refused(self, problem: Problem) -> None:
        """Tell the watchers, once, that it was answered with an error."""
        self._first.refused(problem)

    async def close(self) -> None:
        """Give back all they hold; to be called at the end, again or not."""
        try:
            await _ended(self._pumps)
        finally:  # all of them, whatever becomes of whoever waits for it
            await asyncio.shield(asyncio.gather(*(e.close() for e in self.exchanges)))

    async def _fail(self, number: int) -> None:
        """End the others first, so that only the one that failed is written down as such."""
        await _ended(self._pumps)
        for n, exchange in enumerate(self.exchanges):
            if n != number:
                await exchange.close()
        outcome = self.exchanges[number].outcome
        outcome.status = outcome.status or "error"


async def _pump(
    number: int, exchange: Exchange, came: asyncio.Queue[tuple[int, list[Said] | StillHere | BaseException | None]]
) -> None:
    try:
        async for batch in exchange.batches():
            came.put_nowait((number, batch))
        came.put_nowait((number, None))
    except BaseException as error:
        came.put_nowait((number, error))
        if not isinstance(error, Exception):
            raise


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
