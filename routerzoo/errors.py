"""`UserError`: something that the user can mend. The command line prints its one sentence instead of a traceback."""


class UserError(ValueError):
    """Bad input: a file, a value or a combination of options, named in the message together with the way out."""
