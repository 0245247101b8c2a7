"""The one exception that reaches a user as a single line."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""`OSError.errno` where there is no room: on the disk, in the user's share of it, in a file"""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2; from Python it is an ordinary
    exception. Line breaks and control characters, as names may have them, are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(on_one_line(message))


def on_one_line(text: str) -> str:
    """With line breaks and whatever else cannot be printed escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its name when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class PeerLost(RuntimeError):
    """Another process that takes part in the work is gone, or cannot be reached any more."""
