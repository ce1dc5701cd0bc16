"""Cost of training as ratios within one run: step skipping, masks, packing, and TRL's `SFTTrainer` as a baseline.

.venv/bin/python benchmarks/training.py --chains runs/own/chains.jsonl    # on a CPU; writes benchmarks/training.json
.venv/bin/python benchmarks/training.py --only held-out --chains runs/own/chains.jsonl --out benchmarks/held-out.json
PYTHONPATH=src python benchmarks/training.py --device cuda --out benchmarks/training-h200.json   # 8B, random chains

Variants are interleaved, and one variant of each measurement is run twice (A/A). Without --chains, rows are random
tokens with realistic lengths; the JSON records which.

skipping: an epoch over masked chains (x, a, g, y) against an epoch over the seven data sets of the paper's appendix B
    made of the same chains, both packed. Both arms see each chain once: one in seven rows, the other in one row with
    one draw of the visibility. Over epochs that row shows all shorter chains in expectation; in one epoch it trains 3
    steps where the seven rows train 12, and the JSON has both counts. PyTorch counts the FLOPs, forward and backward;
    "all depths" is an epoch over all chains, where shorter ones have fewer forms. The target is judged on chains with
    all three steps, since only they have seven forms.
held-out: held-out loss after the same number of updates of each arm, over five seeds; three epochs as in the paper. The
    masked arms are the default, skip_p 0.5, and skip_p 0.5 with two draws per chain (train.skip_views).
masks: a training step with step skipping against the same step with causal attention on the same rows.
trainers: non-padding tokens per second over an epoch of `MoteTrainer` (four experts of rank 16, trained markers) and of
    TRL's `SFTTrainer` (PEFT's LoRA of rank 32), padded and packed: same chains, tokens, dtype, rows and settings.
memory: their peak memory, each in a separate process.
"""

import argparse
from pathlib import Path

from mote.experiments.bench.targets import table
from mote.experiments.bench.training import choose, held_out_lines, measure_training


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "shape", "chains", "only"):
        parser.add_argument(f"--{name}")
    for name in ("device", "dtype"):
        parser.add_argument(f"--{name}", default="auto")
    for name in ("count", "batch", "length"):
        parser.add_argument(f"--{name}", type=int)
    for name, value in (
        ("whole", 8),
        ("rounds", 5),
        ("seeds", 5),
        ("first-seed", 0),
        ("trained-on", 64),
        ("epochs", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--skip-p", type=float, default=0.2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = vars(parser.parse_args())
    out = given.pop("out")
    result = measure_training(choose(**given), out)
    print(table(result) + held_out_lines(result))


if __name__ == "__main__":
    main()
