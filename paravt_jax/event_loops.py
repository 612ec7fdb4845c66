"""Event loops that wait for their pending tasks before they close.

Orbax reads and writes on an event loop of its own, where many operations of TensorStore are awaited
together. When one of them fails (a full disk, a damaged file), it closes the loop at once. The
others go on, and each of them finds the loop closed when it ends: a traceback from a thread of
TensorStore, 447 of them for six checkpoints of 40 arrays on a full disk, at any time until the
process ends. Loops of this module hear all of them before they close.
"""

from __future__ import annotations

import asyncio

PATIENCE = 10.0
"""Seconds that tasks have to end, before they are cancelled. On a full disk they took 0.1."""


class Loop(asyncio.SelectorEventLoop):
    """Waits for the tasks that are left before it closes."""

    def close(self) -> None:
        """Close the loop; nobody reports to it afterwards."""
        if not (self.is_closed() or self.is_running()):
            self.run_until_complete(_end_others())
        super().close()


async def _end_others() -> None:
    """Let what else runs on this loop come to its end."""
    await asyncio.sleep(0)  # who waits for a task that has ended hears of it only now
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if not others:
        return
    # Not cancelled at once, as `asyncio.run` does: an operation that ends at that moment would
    # report to a loop that is closed (once in 500).
    _, late = await asyncio.wait(others, timeout=PATIENCE)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=PATIENCE)
    # Exceptions that nobody has looked at would be logged when their tasks are deleted.
    await asyncio.gather(*(task for task in others if task.done()), return_exceptions=True)


class LoopPolicy(asyncio.DefaultEventLoopPolicy):
    """Makes such loops, in every thread."""

    def new_event_loop(self) -> Loop:
        """A loop that is not the thread's own yet."""
        return Loop()


def close_in_order() -> None:
    """From now on this process makes such loops, unless somebody has chosen other ones."""
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        asyncio.set_event_loop_policy(LoopPolicy())
