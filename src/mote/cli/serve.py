"""`mote serve`."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from mote.cli.options import adapter_of, mote, options, settings_of
from mote.core.errors import UserError


@mote.command()
@options("model", "adapter", "answer-engine")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 picks a free one."
)
@click.option("--name", default="mote", show_default=True, help="Model name in requests; NAME:MODE selects a mode.")
@click.option("--api-key-env", metavar="VAR", help="Environment variable with the API key that requests must send.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with that key.")
@click.option("--max-running", type=click.IntRange(1), default=16, show_default=True, help="Concurrent answers.")
@click.option("--max-waiting", type=click.IntRange(0), default=64, show_default=True, help="Queued answers.")
@click.option(
    "--max-request-chars", type=click.IntRange(1), default=100_000, show_default=True, help="Characters per request."
)
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens per answer.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds per request, time in the queue included.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds for answers in flight when the server is stopped.",
)
def serve(
    overrides: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    engine: str | None,
    name: str,
    api_key_env: str | None,
    api_key_file: Path | None,
    **limits: Any,
) -> None:
    """Serve a trained model: an OpenAI-compatible API and a chat page."""
    recipe = settings_of(None, overrides, {"model": model, "engine": engine})
    adapter = adapter_of(adapter)
    if not name or ":" in name:
        raise UserError(f"name: '{name}' would be ambiguous with NAME:MODE; give one without a colon with --name")
    key = _api_key(api_key_env, api_key_file)
    try:
        from mote.serve.server import listen
        from mote.serve.server import serve as run
        from mote.serve.server_settings import ServeSettings
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'mote-align[serve]'") from error
    from mote.inference.load import load_for

    settings = ServeSettings(name=name, api_key=key, answers=recipe.answer, **limits)
    with listen(settings) as listening:
        if not settings.local and key is None:
            print(
                f"mote: warning: anyone who can reach {settings.host} can use the model; set a key with --api-key-env "
                "or --api-key-file",
                file=sys.stderr,
            )
        loaded = load_for(recipe, adapter, batch_size=settings.max_running)
        if loaded.config is not None and loaded.config.whole_rows:
            raise UserError(
                f"adapter: {adapter} is a model for each step (train.method=separate), which the server cannot run; "
                "use `mote answer`"
            )
        run(loaded, settings, listening)


def _api_key(variable: str | None, file: Path | None) -> str | None:
    """The API key; None if neither an environment variable nor a file is given."""
    if variable is not None and file is not None:
        raise UserError("api-key: give --api-key-env or --api-key-file, not both")
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        source = f"api-key-env: ${variable}"
    elif file is not None:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"api-key-file: {file} cannot be read ({error.strerror})") from error
        source = f"api-key-file: {file}"
    else:
        return None
    if not key:
        raise UserError(f"{source} holds no key; put one there or leave the option out")
    return key
