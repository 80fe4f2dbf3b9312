"""Several streams as one, in the order in which items arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any


async def merged(sources: Sequence[AsyncGenerator[Any, None]], deadline: float | None = None) -> AsyncGenerator[Any, None]:
    """The items of all `sources`. An exception in one of them ends all, and so does leaving early.

    `deadline`: on the event loop's clock; raises TimeoutError when not all have ended by then.
    """
    items: asyncio.Queue[tuple[Any, BaseException | None, bool]] = asyncio.Queue()

    async def drain(source: AsyncGenerator[Any, None]) -> None:
        try:
            async for item in source:
                items.put_nowait((item, None, False))
            items.put_nowait((None, None, True))
        except Exception as error:
            items.put_nowait((None, error, True))
        finally:
            await source.aclose()

    tasks = [asyncio.create_task(drain(source)) for source in sources]
    left = len(tasks)
    try:
        while left:
            async with asyncio.timeout_at(deadline):
                item, error, ended = await items.get()
            if error is not None:
                raise error
            left -= ended
            if not ended:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
