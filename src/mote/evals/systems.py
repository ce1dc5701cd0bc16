"""The systems that an evaluation compares: base model, adapters and endpoints, checked before a model is loaded."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mote.core.errors import UserError
from mote.core.files import sha256_of
from mote.core.recipe import DEFAULT_MODES
from mote.core.scheme import BASE
from mote.evals.results import System


def systems_of(
    model: str, adapters: Sequence[str], endpoints: Sequence[str], modes: Sequence[str] | None
) -> list[System]:
    """The systems of a run, base model first.

    The base model is one system; it answers in the mode `base` if that is among the modes or if there is no adapter.
    Each adapter answers in the other modes, each endpoint once.

    Args:
        model: Base model of all adapters.
        adapters: `FOLDER` or `NAME=FOLDER`.
        endpoints: `NAME=MODEL`, where MODEL is a model name of Inspect.
        modes: Modes, optionally with a budget (`full@64`). None for all modes with an adapter, else `base`.

    Raises:
        UserError: Two systems share a name, or an adapter or mode does not exist.
    """
    modes = modes or (DEFAULT_MODES if adapters else (BASE,))
    base_modes = tuple(mode for mode in modes if mode_and_budget(mode)[0] == BASE)
    adapter_modes = tuple(mode for mode in modes if mode not in base_modes)
    if adapter_modes and not adapters:
        check_system(None, adapter_modes[0])
    systems = []
    if base_modes or not adapters:
        base = System(
            name=BASE, model=f"mote/{model}", adapter=None, modes=base_modes or (BASE,), fingerprint=fingerprint(None)
        )
        systems.append(base)
    for given in adapters:
        name, _, folder = given.rpartition("=")
        for mode in adapter_modes:
            check_system(folder, mode)
        system = System(
            name=name or "mote",
            model=f"mote/{model}",
            adapter=folder,
            modes=adapter_modes,
            fingerprint=fingerprint(folder),
        )
        systems += [system] if adapter_modes else []
    for given in endpoints:
        name, equals, endpoint = given.partition("=")
        if not equals or "/" not in endpoint:
            raise UserError(f"system: '{given}' is not NAME=MODEL; write for instance peer=openai-api/vllm/my-model")
        systems.append(System(name=name, model=endpoint, adapter=None, modes=(BASE,), fingerprint=endpoint))
    names = [system.name for system in systems]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"system: two systems are named '{duplicate}'; give each its own name, NAME=...")
    return systems


def mode_and_budget(name: str) -> tuple[str, int | None]:
    """Split a mode from its budget per step (`full@64`), None without one.

    Raises:
        UserError: The text after the @ is not a positive number of tokens.
    """
    mode, at, budget = name.partition("@")
    if at and not (budget.isascii() and budget.isdigit() and int(budget) > 0):
        raise UserError(f"mode: '{name}' has no budget after the @; write tokens per step, such as {mode}@64")
    return mode, int(budget) if at else None


def check_system(adapter: str | None, name: str) -> None:
    """Check that an adapter can be read and has a mode, which may carry a budget.

    Raises:
        UserError: It cannot be read, does not have the mode, or the mode needs an adapter and there is none.
    """
    mode, _ = mode_and_budget(name)
    if adapter is None:
        if mode != BASE:
            raise UserError(f"mode: '{mode}' needs a trained adapter; give one, or use the mode 'base'")
        return
    from mote.inference.load import read_adapter

    trained = read_adapter(adapter)
    trained.scheme.check_mode(mode, trained.config.experts)


def fingerprint(adapter: str | None) -> str:
    """The first 16 hex digits of the sha256 of an adapter's weights.

    Without an adapter `base`; for an adapter that is not a local folder, its name.
    """
    if adapter is None:
        return BASE
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        return adapter
    status = weights.stat()
    return _file_hash(weights, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _file_hash(weights: Path, modified_ns: int, size: int) -> str:
    """Cached per modification time and size, so that a changed file is hashed again."""
    return (sha256_of(weights) or "")[:16]
