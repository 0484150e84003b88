"""Work shared among prepared processes, answers in order; one that dies is an error.

`multiprocessing.Pool` replaces a process that dies and forgets what it was at: where each dies at its start (a package
or a driver is missing) it goes on starting them for ever."""

import itertools
import multiprocessing as mp
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

ANSWER_LIMIT_S = 600.0
LOOK_PERIOD_S = 0.2


def in_order(
    work: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    begin: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Any]:
    """`work(item)` of each item, by processes that have each run `begin(*arguments)`; `items` may be endless, two for
    each process are under way. Raises RuntimeError when a process dies or is silent, else what `work` raises."""
    others = _children()
    with mp.get_context("spawn").Pool(workers, begin, arguments) as pool:
        crew, items = _children() - others, iter(items)
        jobs = deque(pool.apply_async(work, (item,)) for item in itertools.islice(items, 2 * workers))
        while jobs:
            until_s = time.monotonic() + ANSWER_LIMIT_S
            while not jobs[0].ready():
                jobs[0].wait(LOOK_PERIOD_S)
                if len(crew & _children()) < workers:
                    raise RuntimeError("a worker process died: its own error output, above, says why")
                if time.monotonic() > until_s:
                    raise RuntimeError(f"no worker process answered within {ANSWER_LIMIT_S:.0f} s")
            yield jobs.popleft().get()
            jobs.extend(pool.apply_async(work, (item,)) for item in itertools.islice(items, 1))


def _children() -> set[int | None]:
    """Processes that this one started and that live."""
    return {child.pid for child in mp.active_children()}
