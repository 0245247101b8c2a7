"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2; from Python it is an ordinary
    exception.
    """
