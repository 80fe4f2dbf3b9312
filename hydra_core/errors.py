"""What ends a run in one line: a mistake that the user can mend, or work that cannot go on."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: one line that names the field, file or row, and what to do about it.

    Jobs print it without a traceback and exit 2; libraries may catch it as `ValueError`.
    """


class StoppedError(RuntimeError):
    """Work that stopped itself because going on would be in vain: one line that says what, where and what is kept.

    Jobs print it without a traceback and exit 1.
    """
