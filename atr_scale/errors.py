"""The one error type a user is meant to see."""

from __future__ import annotations

import textwrap


class UserError(ValueError):
    """A mistake the user can mend: one line with the cause, the place and the remedy.

    The command line prints the message alone and exits with code 2; anything else is a failure of ours.
    """


def one_line(error: Exception | str, width: int = 300) -> str:
    """The message of `error`, or a text, in one line, without its last full stop; if too long, cut between words."""
    return textwrap.shorten(str(error).rstrip(". \n"), width, placeholder=" ...")
