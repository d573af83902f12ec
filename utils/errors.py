"""Errors that end a script with one line and no traceback; `options.run_script` prints them."""


class InputError(Exception):
    """Bad input from the user: one line that names the flag and the value. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on: one line that says what happened and what is kept. Exit code 1."""
