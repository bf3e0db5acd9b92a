"""Errors that a user can fix. Each message names the problem, its place and the cure in one line.

The command line shows them without a traceback and exits with code 2; other exceptions keep their traceback. Each class
also derives from the built-in exception that Python code expects.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An option, a file or a combination of options is invalid."""


class UserFileError(OSError, UserError):
    """A file or folder cannot be read or written."""


class MissingFileError(FileNotFoundError, UserFileError):
    """A file or folder does not exist."""


class ExistingFileError(FileExistsError, UserFileError):
    """A file or folder exists already."""


class MissingPackageError(ModuleNotFoundError, UserError):
    """A required package is not installed."""


class NotFiniteError(FloatingPointError, UserError):
    """Training diverged."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence with the names in `names` that `name` may stand for; with all, if they are few."""
    spelled = {k.lower(): k for k in sorted(names)}
    close = [spelled[k] for k in difflib.get_close_matches(name.lower(), list(spelled), n=3, cutoff=0.55)]
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" There are: {', '.join(sorted(spelled.values()))}." if 0 < len(spelled) <= 15 else ""
