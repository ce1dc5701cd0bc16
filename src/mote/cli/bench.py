"""`mote bench`."""

from pathlib import Path
from typing import Any

import click

from mote.cli.options import MODEL_HELP, file_of, mote


@mote.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Benchmark speed and memory, as ratios within one run."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
@click.option("--model", help=MODEL_HELP)
@click.option("--shape", help="Random weights of a shape instead: llama-3.1-8b, smollm2-135m, tiny.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", help="auto, float32, bfloat16 or float16.")
@click.option("--rows", type=int, help="Training batch size; default 2 on a CPU, 8 on a GPU.")
@click.option("--length", type=int, help="Tokens per row; default 512 on a CPU, 2048 on a GPU.")
@click.option("--rounds", type=int, default=7, show_default=True, help="Measurements per variant.")
@click.option("--compile/--eager", "compiled", default=None, help="Also measure torch.compile; default on a GPU.")
@click.option("--checkpointing", is_flag=True, help="Train with gradient checkpointing.")
@click.option("--only", help="Variants, comma-separated; the reference and its A/A control always run.")
@click.option("--measures", help="Comma-separated: training, decoding, saved, memory, peft.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write; updated after each measurement.")
def experts(out: Path | None, **flags: Any) -> None:
    """Compare step experts with plain LoRA and other baselines.

    Measures training steps, decoding, saved activations and peak memory, interleaved in one process with an A/A
    control, and says which of the project's targets are met.
    """
    from mote.experiments.bench.compare_experts import compare_variants
    from mote.experiments.bench.expert_settings import choose_settings
    from mote.experiments.bench.targets import table

    file = None if out is None else file_of(out, ".json")
    print(table(compare_variants(choose_settings(**flags), file)))
