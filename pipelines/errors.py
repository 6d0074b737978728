"""The two ways in which a run ends with one line instead of a traceback."""


class UsageError(ValueError):
    """An option, file or folder that the user has to change. Exit code 2."""

    exit_code = 2


class DataError(RuntimeError):
    """Data or a run that turned out to be broken on the way. Exit code 1."""

    exit_code = 1
