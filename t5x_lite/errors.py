"""Errors that a user can fix. Each message names the problem, its place and the cure in one line.

The command line shows them without a traceback and exits with code 2; other exceptions keep their traceback. Each class
also derives from the built-in exception that Python code expects.
"""


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
