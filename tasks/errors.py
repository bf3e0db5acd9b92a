"""Errors that a user can put right, as one line; `t5x_lite.errors` has the same for what does not need TensorFlow.

They are also the built-in errors that Python code expects.
"""


class UserError(ValueError):
    """A name, file, row or combination that the user has to change."""


class UserFileError(OSError, UserError):
    """A file or folder that cannot be read or written."""


class MissingFileError(FileNotFoundError, UserFileError):
    """A file or folder that does not exist."""
