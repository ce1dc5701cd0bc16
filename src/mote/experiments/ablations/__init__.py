"""Ablations: several methods and seeds on the same chains in one table, among them the paper's tables and figures."""

from mote.experiments.ablations.ablation_recipe import Ablations, Variant, load_ablations
from mote.experiments.ablations.runner import run_ablations

__all__ = ["Ablations", "Variant", "load_ablations", "run_ablations"]
