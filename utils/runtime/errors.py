"""Errors that end a script with one line and no traceback; `script.run_script` prints them."""


def printable(text: str) -> str:
    """The text in one line that shows every character: what is not printable is escaped.

    A name can hold a line feed, what moves a terminal's cursor, or bytes that are no text; those
    come as \\n, \\x1b, \\xff. A second pass changes nothing.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python reads a byte that is no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class InputError(Exception):
    """Bad input from the user: one line that names the flag and the value. Exit code 2."""


class DamagedError(InputError):
    """A file that is missing, cut short or changed: another one may do instead."""


class RunError(Exception):
    """A run that cannot go on: one line that says what happened and what is kept. Exit code 1."""


class Interrupted(Exception):
    """A run that a signal stopped and that is saved: started again with --resume auto it goes on.

    exit_code: 75, the system's "temporary failure", for a script that puts the job back into the
    queue; 130 for Ctrl-C.
    """

    def __init__(self, message: str, *, exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code
