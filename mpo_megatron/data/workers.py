"""Worker processes that tokenize: started by a fork server, with results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from mpo_megatron.files import DataError

_AHEAD = 4
"""Unfinished chunks per worker: keeps workers busy and bounds memory."""


def start_fork_server() -> ForkServerContext:
    """Start the process that workers are forked from. It imports for seconds: start it before work that it can run beside."""
    # Not fork: the parent has threads (Arrow, the progress bar). The fork server imports once, and its children start clean.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpo_megatron.data.tokenizing", "transformers.models.auto.tokenization_auto"])
    forkserver.ensure_running()
    return context


def _use_one_thread() -> None:
    """Keep `tokenizers` from starting a thread per core in each worker: they would compete, each with its own cache of words."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def map_in_order[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map` over processes: results in the order of the items, with a bounded number in progress."""
    if num_workers == 1:
        yield from map(function, items)
        return
    context = start_fork_server()
    under_way: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_use_one_thread) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= _AHEAD * num_workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"num_workers = {num_workers}; a tokenizing process died, perhaps out of memory; use fewer workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
