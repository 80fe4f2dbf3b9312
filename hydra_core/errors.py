"""Errors that end a run with one line: a mistake that the user can correct, or work that cannot continue."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: one line that names the field, file or row, and says how to correct it.

    Jobs print it without a traceback and exit with status 2; libraries may catch it as `ValueError`.
    """


class StoppedError(RuntimeError):
    """Work that stops itself because it cannot succeed: one line that says what happened, where, and what is kept.

    Jobs print it without a traceback and exit with status 1.
    """
