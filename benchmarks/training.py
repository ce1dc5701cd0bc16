"""What training costs, as ratios in one run: step skipping, masks, packing, and TRL's `SFTTrainer` beside ours.

.venv/bin/python benchmarks/training.py --chains runs/own/chains.jsonl    # on a CPU; writes benchmarks/training.json
.venv/bin/python benchmarks/training.py --only held-out --chains runs/own/chains.jsonl --out benchmarks/held-out.json
PYTHONPATH=src python benchmarks/training.py --device cuda --out benchmarks/training-h200.json   # 8B, made-up rows

Variants take turns, and one of each measure is measured twice (A/A). Without --chains, rows are random tokens of the
shape of chains; the JSON says which.

skipping: an epoch of masked chains (x, a, g, y) over an epoch of the seven data sets of the paper's appendix B built
    from the same chains, both packed. Seen examples are chains: both arms see each chain once, one of them in seven
    rows, the other in one row with one draw of what its steps see. That row shows the shorter chains in expectation
    over epochs, not all of them at once: it trains 3 steps where the seven rows train 12, and the JSON has both counts.
    FLOPs are counted by PyTorch, forward and backward; "all depths" counts an epoch of all chains, where shorter ones
    have fewer forms. The bar is judged on chains of all three steps, since only they have seven forms.
held-out: the loss on held-out chains after as many updates of each arm, over five seeds; three epochs are the paper's.
    Masked passes have the default's draws, those of skip_p 0.5, and two views of each chain (train.skip_views).
masks: a training step with step skipping over the same step with plain causal attention of the same rows.
trainers: real tokens a second of an epoch of `MoteTrainer` (four experts of rank 16, markers trained) and of TRL's
    `SFTTrainer` (PEFT's LoRA of rank 32), padded and packed: same chains, tokens, dtype, rows and settings.
memory: their peaks, each in a process of its own.
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
