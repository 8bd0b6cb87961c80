"""The one error class that users see: a single line with the fact, the value and the fix."""


class LemoError(ValueError):
    """Bad input from outside (data, recipe, files). Its message is one line, `fact; value; fix`.

    The CLI prints it on stderr without a traceback and exits with code 2.
    """
