"""The errors a user sees as one line: their own (exit code 2) and those of a run or the machine (exit code 1)."""


class MoteError(Exception):
    """Something failed while running; the command line prints it as one line and exits with code 1."""

    exit_code = 1


class UserError(MoteError):
    """Invalid input; the message names the setting, the value and the remedy; exit code 2."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """The first line of an error's message; for a pydantic error, its first entry with the field's path."""
    # Not by its type: `mote bench` runs where pydantic is not installed.
    entries = getattr(error, "errors", None)
    if isinstance(error, ValueError) and callable(entries):
        first = entries()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
