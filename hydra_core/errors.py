"""The one exception type that means "the user can mend this"."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: one line that names the field, file or row, and what to do about it.

    Jobs print it without a traceback and exit 2; libraries may catch it as `ValueError`.
    """
