"""The error classes that users see: a single line with the fact, the value and the fix."""


class LemoError(ValueError):
    """Bad input from outside (data, recipe, files). Its message is one line, `fact; value; fix`.

    The CLI prints it on stderr without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class LemoRunError(LemoError):
    """What ended a run whose input was sound: memory, disk, a loss that is no number. One line, as for every `LemoError`."""

    exit_code = 1


class LemoStopped(SystemExit):
    """A signal ended the run after what it had done was saved; `code` is 128 plus the signal's number, as shells have it.

    No `Exception`: code after `train()` that would take the run for a finished one is not reached.
    """
