"""Errors that a user can act on. The command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input: the message names the key or file, what was found and what was wanted."""


def in_one_line(error: BaseException) -> str:
    """Return class and message of another library's error on one line, the message's first 400 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
