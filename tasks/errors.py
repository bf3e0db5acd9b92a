"""Errors that a user can fix, reported in one line; `t5x_lite.errors` has the same classes for the trainer.

They derive from the built-in errors that Python code expects.
"""


class UserError(ValueError):
    """A name, file, row or combination of settings that the user has to change."""


class UserFileError(OSError, UserError):
    """A file or folder that cannot be read or written."""


class MissingFileError(FileNotFoundError, UserFileError):
    """A file or folder that does not exist."""
