"""The two errors a user sees as one line: theirs (exit 2) and ours or the machine's (exit 1)."""


class MoteError(Exception):
    """Something failed while running; the command line prints it as one line and exits with 1."""

    exit_code = 1


class UserError(MoteError):
    """The user gave something that cannot work; the text names the setting, the value and the remedy; exit 2."""

    exit_code = 2
