"""The two errors a user sees as one line: theirs (exit 2) and ours or the machine's (exit 1)."""


class MoteError(Exception):
    """Something failed while running; the command line prints it as one line and exits with 1."""

    exit_code = 1


class UserError(MoteError):
    """The user gave something that cannot work; the text names the setting, the value and the remedy; exit 2."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """The message of an error as one line; of a pydantic error, its first complaint with the setting's path."""
    # By its shape: `mote bench` runs where pydantic is not installed.
    if isinstance(error, ValueError) and callable(complaints := getattr(error, "errors", None)):
        first = complaints()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
