"""Errors that a user can put right: one line that names what is wrong, where, and the cure.

The command shows them without a traceback and exits with code 2; whatever else is raised keeps its traceback. They are
also the built-in errors that Python code expects.
"""


class UserError(ValueError):
    """An option, file or combination that the user has to change."""


class UserFileError(OSError, UserError):
    """A file or folder that cannot be read or written."""


class MissingFileError(FileNotFoundError, UserFileError):
    """A file or folder that does not exist."""


class ExistingFileError(FileExistsError, UserFileError):
    """A file or folder that is in the way."""


class MissingPackageError(ModuleNotFoundError, UserError):
    """A package that this needs and that is not installed."""


class NotFiniteError(FloatingPointError, UserError):
    """Training diverged."""
