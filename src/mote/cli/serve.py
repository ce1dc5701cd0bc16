"""The server."""

import os
import sys
from pathlib import Path

import click

from mote.cli.options import adapter_of, mote, options, settings_of
from mote.core.errors import UserError


@mote.command()
@options("model", "adapter")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--name", default="mote", show_default=True, help="The model's name in requests; NAME:MODE is a mode.")
@click.option("--api-key-env", metavar="VAR", help="Environment variable with the key that requests must bring.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with that key.")
@click.option("--max-running", type=click.IntRange(1), default=16, show_default=True, help="Answers written at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=64, show_default=True, help="Answers that may wait.")
@click.option(
    "--max-request-chars", type=click.IntRange(1), default=100_000, show_default=True, help="Characters of a request."
)
@click.option("--max-tokens", type=click.IntRange(16), default=4096, show_default=True, help="Tokens of an answer.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds a request may take, waiting included.",
)
@click.option(
    "--grace", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish when stopped."
)
def serve(
    overrides: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    host: str,
    port: int,
    name: str,
    api_key_env: str | None,
    api_key_file: Path | None,
    max_running: int,
    max_waiting: int,
    max_request_chars: int,
    max_tokens: int,
    timeout: float,
    grace: float,
) -> None:
    """Serve a trained model: an OpenAI-compatible API and a chat page."""
    recipe, adapter = settings_of(None, overrides, {"model": model}), adapter_of(adapter)
    if not name or ":" in name:
        raise UserError(f"name: '{name}' cannot be told from name:mode; give one without a colon with --name")
    key = _key(api_key_env, api_key_file)
    try:
        from mote.serve.server import listen
        from mote.serve.server import serve as run
        from mote.serve.server_settings import ServeSettings
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'mote-align[serve]'") from error
    from mote.inference.load import load

    settings = ServeSettings(
        name=name,
        host=host,
        port=port,
        api_key=key,
        max_running=max_running,
        max_waiting=max_waiting,
        max_request_chars=max_request_chars,
        max_tokens=max_tokens,
        timeout=timeout,
        grace=grace,
        answers=recipe.answer,
    )
    with listen(settings) as listening:
        if not settings.local and key is None:
            print(f"mote: warning: anybody who reaches {host} can use the model; give a key with --api-key-env "
                  "or --api-key-file", file=sys.stderr)  # fmt: skip
        loaded = load(
            recipe.model,
            adapter,
            device=recipe.device,
            dtype=recipe.dtype,
            revision=recipe.revision,
            batch_size=max_running,
        )
        if loaded.config is not None and loaded.config.whole_rows:
            raise UserError(
                f"adapter: {adapter} is a model for each step (train.method=separate), which the server cannot run; "
                "use `mote answer`"
            )
        run(loaded, settings, listening)


def _key(variable: str | None, file: Path | None) -> str | None:
    """The API key, None where none is wanted."""
    if variable is not None and file is not None:
        raise UserError("api-key: give --api-key-env or --api-key-file, not both")
    if variable is not None:
        key, where = os.environ.get(variable, "").strip(), f"api-key-env: ${variable}"
    elif file is not None:
        try:
            key, where = file.read_text(encoding="utf-8").strip(), f"api-key-file: {file}"
        except OSError as error:
            raise UserError(f"api-key-file: {file} cannot be read ({error.strerror})") from error
    else:
        return None
    if not key:
        raise UserError(f"{where} holds no key; put one there or leave the option out")
    return key
