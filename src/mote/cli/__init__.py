"""The command line: thin commands over the package. An error is one line on stderr and an exit code."""

import functools
import os
import sys
import traceback
import warnings

import click

from mote.cli import (  # noqa: F401 (each adds its commands)
    ablations,
    bench,
    chains,
    chat,
    doctor,
    evals,
    export,
    serve,
    stages,
)
from mote.cli.options import mote as mote
from mote.core.errors import MoteError


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:  # what other libraries are going to rename is nothing that a user of the commands can change
        warnings.simplefilter("ignore", FutureWarning)
    fail = functools.partial(_fail, debug)
    try:
        mote.main(args=arguments or ["--help"], prog_name="mote", standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mote"
        fail(error, f"{error.format_message().rstrip('.')} (see `{command} --help`)", 2)
    except click.ClickException as error:
        fail(error, error.format_message(), 2)
    except MoteError as error:
        fail(error, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        fail(error, "interrupted; finished rows and checkpoints are kept, the same command resumes from there", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(error, f"{where}{error.strerror or error}; finished work is kept, run the same command again", 1)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        fail(error, f"{type(error).__name__}: {line} (add --debug for the traceback)", 1)


def _fail(debug: bool, error: BaseException, message: str, code: int) -> None:
    if debug:
        traceback.print_exception(error)
    print(f"mote: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
