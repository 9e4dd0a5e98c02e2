"""Errors that a user can act on, and the words in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user wrote or asked for cannot work.

    The message is one sentence: what was found, what was wanted, what to do. The command line prints it without a
    traceback and exits with code 2.

    Attributes:
        told: another process of the same run says so, so that this one need not.
    """

    told = False


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or `"; known: a, b, c"` when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    if not names:
        return "; there are none"
    return f"; known: {', '.join(names)}"
