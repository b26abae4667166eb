"""The one error for bad input; imports nothing, so that quick answers can use it."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the argument, its value, what is allowed and the remedy; the command line
    prints it alone (no traceback) and exits with code 2.
    """
