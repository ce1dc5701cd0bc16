"""Step experts against plain LoRA and other baselines: `mote bench experts`, for machines without mote installed.

.venv/bin/python benchmarks/experts.py           # on a CPU; writes benchmarks/experts.json
PYTHONPATH=src python benchmarks/experts.py --device cuda --out benchmarks/experts-h200.json

On a CPU glibc maps and unmaps large tensors in every forward pass, which costs a variant a varying 0.1 to 1.5 s a step.
With MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment it keeps the memory; the JSON records it.
"""

import argparse
from pathlib import Path

from mote.experiments.bench.compare_experts import compare_variants
from mote.experiments.bench.expert_settings import choose_settings
from mote.experiments.bench.targets import table


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "shape", "only", "measures"):
        parser.add_argument(f"--{name}")
    for name in ("device", "dtype"):
        parser.add_argument(f"--{name}", default="auto")
    for name in ("rows", "length"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", default=None, dest="compiled")
    parser.add_argument("--eager", action="store_false", default=None, dest="compiled")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = vars(parser.parse_args())
    out = given.pop("out")
    print(table(compare_variants(choose_settings(**given), out)))


if __name__ == "__main__":
    main()
