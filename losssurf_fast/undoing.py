"""Blocks after which something is as before, also where Ctrl-C cuts them off."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def afterwards(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` at the end of a block, and once more where an exception, such as Ctrl-C's, left it half done.

    Changes belong into the block, not before it.
    """
    done = False
    try:
        try:
            yield
        finally:
            undo()
            done = True
    finally:
        if not done:
            undo()
