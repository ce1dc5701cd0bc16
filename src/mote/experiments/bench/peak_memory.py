"""Peak memory of training on a CPU, measured in a fresh process: this module, run with settings and a variant."""

import json
import subprocess
import sys
from typing import Any

from mote.core.errors import MoteError
from mote.core.machine import resident_peak_mb


def peak_mb_in_subprocess(
    settings: dict[str, Any], name: str, module: str = "mote.experiments.bench.peak_memory"
) -> float:
    """Peak MB of a fresh process that runs a module; the module prints it.

    Args:
        settings: Its first argument, as JSON.
        name: Its second argument, what is trained.
        module: This one trains a variant of `mote bench experts` for two steps.

    Raises:
        MoteError: The process failed.
    """
    command = [sys.executable, "-m", module, json.dumps(settings), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise MoteError(f"bench: peak memory of {name} could not be measured ({reason}); free memory and run again")
    return float(done.stdout.split()[-1])


def main() -> None:
    """Train a variant for two steps and print the peak memory."""
    import torch

    from mote.experiments.bench.expert_settings import ExpertBenchSettings, load_model
    from mote.experiments.bench.measurements import TrainingStep, make_batch
    from mote.experiments.bench.variants import build

    settings = ExpertBenchSettings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    base = load_model(settings)
    batch = make_batch(settings.rows, settings.length, base.config.vocab_size, settings.device)
    training = TrainingStep(build(sys.argv[2], base, settings.checkpointing), batch)
    training()
    training()
    print(round(resident_peak_mb(), 1))


if __name__ == "__main__":
    main()
