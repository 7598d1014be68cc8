"""Errors that a user can act on. The command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input: the message names the key or file, what was found and what was wanted."""
