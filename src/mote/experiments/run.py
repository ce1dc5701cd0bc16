"""`mote run`: questions -> chains -> train -> answer -> eval -> report; each stage is resumable."""

import asyncio
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mote.chains.engine import Engine
from mote.chains.judge import Judge, QuestionJudge
from mote.chains.make import make_chains
from mote.chains.prompts import check_prompt
from mote.chains.safety_check import ChoiceJudge, WordJudge
from mote.core.errors import UserError
from mote.core.files import sha256_of, write_atomic
from mote.core.generation import Limits, Sampling
from mote.core.machine import is_first_process
from mote.core.methods import apply_method, steps_of
from mote.core.progress import Progress
from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe, load_recipe
from mote.core.records import Answer, ChainRow, LeftOut, Question, append_rows, iter_rows, read_rows, rewrite_rows
from mote.core.scheme import CHECK, Chain, load_scheme
from mote.experiments.eval_stage import evaluate, inspect_is_installed, suite_of_run
from mote.experiments.stage_log import StageLog, changed_keys
from mote.questions.load import load_questions, select_questions

if TYPE_CHECKING:
    from mote.inference.model import Model
    from mote.models.capabilities import Capabilities
    from mote.models.load import Base


class Run:
    """One run folder and its stages.

    Each stage is resumable: a complete result is reused, a partial one is continued, and a result of other settings is
    refused or set aside.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.scheme = load_scheme(recipe.scheme)
        self.stages = StageLog(folder)
        self._base: Base | None = None

    def all(self) -> None:
        """Every stage in sequence."""
        self.claim()
        self.chains()
        self.train(self.folder / "chains.jsonl")
        self.answer(self.folder / "adapter")
        self.evaluate(self.folder / "adapter")
        self.report()

    def claim(self) -> None:
        """Check every setting and write `recipe.yaml`, so that nothing fails for its settings after hours of work.

        Raises:
            UserError: The folder holds another recipe's run, a setting cannot work, or the questions cannot be read.
        """
        from mote.train import check_settings

        recipe = self.recipe
        self._check_modes(steps_of(recipe, self.scheme))
        check_settings(recipe, self.scheme, self.folder)  # before the folder: a mistyped setting is no other recipe
        path = self.folder / "recipe.yaml"
        text = dump_recipe(recipe)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            # A recipe written by an older version lacks newer settings and is the same if their defaults are.
            changed = changed_keys(load_recipe(path).model_dump(mode="json"), recipe.model_dump(mode="json"))
            if changed:
                raise UserError(
                    f"out: {self.folder} holds the run of another recipe (it differs in {changed}); give another "
                    "folder with --out, or remove that one"
                )
        load_questions(recipe.answer.questions, recipe.answer.limit, recipe.chains.max_question_chars)
        self._check_base()
        if suite_of_run(recipe) is not None and not inspect_is_installed():
            print(
                "eval: inspect-ai is not installed, so the run ends without an evaluation; install mote-align[eval], "
                "or say eval=false",
                file=sys.stderr,
            )
        if recipe.engine == "llamacpp":
            from mote.inference.engines.llama_files import check_model

            check_model(recipe.model, recipe.revision, recipe.device, recipe.dtype)
        self.questions()
        write_atomic(path, text)

    def questions(self) -> Path:
        """`questions.jsonl`, the questions to make chains for; selected once, then read from the folder.

        Raises:
            UserError: The file holds other questions than the recipe selects.
        """
        recipe = self.recipe
        path = self.folder / "questions.jsonl"
        claimed = self.folder / "recipe.yaml"
        if path.exists() and claimed.exists() and claimed.read_text(encoding="utf-8") == dump_recipe(recipe):
            return path
        left_out: list[LeftOut] = []
        selected = select_questions(recipe, left_out.append)
        if not path.exists():
            rewrite_rows(path, selected)
            if left_out:
                rewrite_rows(self.folder / "left_out.jsonl", left_out)
                counts = Counter(row.why for row in left_out)
                why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
                print(f"questions: {len(left_out)} left out ({why}), listed in left_out.jsonl", file=sys.stderr)
        elif any(one != other for one, other in zip_longest(iter_rows(path, Question), selected)):
            raise UserError(
                f"questions: {path} holds {sum(1 for _ in iter_rows(path, Question))} questions, and not those of "
                f"questions={recipe.questions} limit={recipe.limit}; use another --out or remove it"
            )
        return path

    def chains(self) -> None:
        """Questions -> `chains.jsonl`."""
        recipe = self.recipe
        questions = self.questions()
        path = self.folder / "chains.jsonl"
        made_by = {
            "model": recipe.model,
            "prompts": self.scheme.prompts_hash(recipe.chains.examples),
            "seed": recipe.seed,
            "engine": recipe.engine,
            "chains": recipe.chains.model_dump(mode="json", exclude={"batch_size", "keep_old"}),
        }
        self._set_aside_other_chains(path, made_by)
        ids = {question.id for question in iter_rows(questions, Question)}
        done = sum(row.id in ids for row in iter_rows(path, ChainRow))
        if done == len(ids):
            self.stages.reuse("chains", made_by, f"{len(ids)} chains exist")
            return
        with self.stages.record("chains", made_by, path) as result:
            with Progress("chains", "questions") as progress:
                progress(done, len(ids))
                asyncio.run(self._make_chains(questions, path, lambda made: progress(made, len(ids))))
            accepted = sum(row.accepted for row in iter_rows(path, ChainRow))
            result.note = f"{accepted} of {len(ids)} chains accepted"

    async def _make_chains(self, questions: Path, path: Path, progress: Callable[[int], None]) -> None:
        recipe = self.recipe
        engine = self._engine()
        try:
            async with self._judge(engine) as judge:
                rows = iter_rows(questions, Question)
                await make_chains(rows, engine, judge, self.scheme, recipe.chains, recipe.seed, path, progress)
        finally:
            await engine.close()

    def _set_aside_other_chains(self, path: Path, made_by: dict[str, Any]) -> None:
        """Move chains of other settings to a separate file, and restore those of the current settings.

        With `chains.keep_old` the old ones stay, and new ones are added to them.
        """
        first = next(iter_rows(path, ChainRow), None)
        if first is None:
            return
        old = self.stages.settings("chains")
        if old is None:  # chains that were copied here
            old = {"model": first.model, "prompts": first.prompts, "seed": first.seed}
        changed = changed_keys(old, {key: made_by[key] for key in old})
        if not changed:
            return
        self.stages.forget("chains")
        if self.recipe.chains.keep_old:
            print(f"chains: existing chains differ in {changed}; they are kept (chains.keep_old)", file=sys.stderr)
            return
        aside = _chains_of_settings(path, old)
        path.rename(aside)
        print(f"chains: existing chains differ in {changed}; they were moved to {aside.name}", file=sys.stderr)
        own = _chains_of_settings(path, made_by)
        if own.exists():
            own.rename(path)

    def train(self, chains: Path) -> Path:
        """Chains -> `adapter/` and `metrics.jsonl`."""
        recipe = self.recipe
        adapter = self.folder / "adapter"
        checkpoints = self.folder / "checkpoints"
        rows = sorted(read_rows(chains, ChainRow), key=lambda row: row.id)  # the file is in completion order
        made_by = {
            "model": recipe.model,
            "seed": recipe.seed,
            "chains": _hash_of(rows),
            "experts": recipe.experts.model_dump(mode="json"),
            "train": recipe.train.model_dump(mode="json"),
        }
        if (adapter / "adapter_config.json").exists():
            self.stages.reuse("train", made_by, f"{adapter} exists")
        else:
            with self.stages.record("train", made_by, checkpoints) as result:
                self._train(rows, chains)
                result.note = f"trained into {adapter}"
        if is_first_process():  # left behind if the process was killed right after training
            shutil.rmtree(checkpoints, ignore_errors=True)
        return adapter

    def _train(self, rows: list[ChainRow], source: Path) -> None:
        if not rows:
            raise UserError(f"chains: {source} holds no chains; make some with `mote chains`")
        from mote.train import train

        capabilities = self._check_base()
        quantization = self.recipe.train.quantization
        base = self.base() if quantization == "none" else self._load_base(quantization)
        train(base, rows[: self.recipe.limit], self.scheme, self.recipe, self.folder, capabilities)
        self._base = None  # the base model now carries the adapter; later stages reload from disk

    def answer(self, adapter: Path) -> None:
        """Test questions -> `answers/<system>-<mode>.jsonl`, one file per mode."""
        self._check_modes((CHECK,))  # whether the adapter has a check step is known once it exists
        settings = self.recipe.answer
        folder = self.folder / "answers"
        questions = load_questions(settings.questions, settings.limit, self.recipe.chains.max_question_chars)
        ids = {question.id for question in questions}
        paths = {mode: folder / f"{settings.system}-{mode}.jsonl" for mode in settings.modes}
        answered = {mode: {row.id for row in read_rows(path, Answer)} for mode, path in paths.items()}
        total = len(questions) * len(paths)
        done = sum(len(ids & known) for known in answered.values())
        # One folder may hold the answers of several systems.
        stage = "answer" if settings.system == "mote" else f"answer {settings.system}"
        made_by = {
            "model": self.recipe.model,
            "seed": self.recipe.seed,
            "adapter": sha256_of(adapter / "adapter_model.safetensors"),
            "answer": settings.model_dump(mode="json", exclude={"questions", "limit", "modes", "batch_size"}),
            **self._answer_engine(),
        }
        if done == total:
            self.stages.reuse(stage, made_by, f"{total} answers exist")
            return
        with self.stages.record(stage, made_by, folder) as result:
            model = self._load_adapter(adapter)
            with Progress("answer", "answers") as progress:
                progress(done, total)
                for mode, path in paths.items():
                    answer_questions(model, questions, mode, self.recipe, path, answered[mode])
                    progress(sum(len(read_rows(path, Answer)) for path in paths.values()), total)
            result.note = f"{total} answers in {len(paths)} modes"

    def evaluate(self, adapter: Path) -> None:
        """Answers to the recipe's suite, judged -> `evals/`; left out with `eval=false` or without Inspect."""
        recipe = self.recipe
        suite = suite_of_run(recipe)
        if suite is None or not inspect_is_installed():
            return
        folder = self.folder / "evals"
        made_by = {
            "model": recipe.model,
            "seed": recipe.seed,
            "adapter": sha256_of(adapter / "adapter_model.safetensors"),
            "modes": list(recipe.answer.modes),
            "suite": suite.model_dump(mode="json", exclude={"batch_size"}),
            "eval": recipe.eval.model_dump(mode="json"),
            **self._answer_engine(),
        }
        if (folder / "summary.json").exists() and self.stages.settings("eval") == made_by:
            self.stages.reuse("eval", made_by, f"{folder / 'summary.json'} exists")
            return
        with self.stages.record("eval", made_by, folder) as result:
            self._base = None  # Inspect loads its own
            answers = evaluate(recipe, suite, adapter, self.folder)
            result.note = f"{answers} judged answers to the suite {suite.name}"

    def report(self) -> None:
        """Everything in the folder -> `report.json` and `report.html`; fast, so always rewritten."""
        from mote.report.report_page import write_report

        page = self.folder / "report.html"
        with self.stages.record("report", {}, page) as result:
            write_report(self.folder)
            result.note = str(page)

    def base(self) -> "Base":
        """The base model, loaded on the first call."""
        if self._base is None:
            self._base = self._load_base()
        return self._base

    def _check_base(self) -> "Capabilities":
        """What the base model can do.

        Raises:
            UserError: It cannot be trained with the recipe's settings.
        """
        from mote.inference.compare_base import checked
        from mote.models.load import load_config
        from mote.train import check_base

        base = checked(load_config(self.recipe.model, self.recipe.revision))
        check_base(apply_method(self.recipe, self.scheme), base)
        return base

    def _load_base(self, quantization: Literal["none", "8bit", "4bit"] = "none") -> "Base":
        from mote.models.load import load_base

        recipe = self.recipe
        return load_base(recipe.model, recipe.device, recipe.dtype, recipe.revision, quantization)

    def _load_adapter(self, adapter: Path) -> "Model":
        from mote.inference.load import load_for, read_adapter

        recipe = self.recipe
        trained = read_adapter(adapter)
        self._check_modes(trained.config.experts)
        return load_for(recipe, trained, recipe.answer.batch_size)

    def _answer_engine(self) -> dict[str, str]:
        """For a stage's settings: the engine and its type of weights, unless it is transformers."""
        recipe = self.recipe
        return {"engine": recipe.engine, "dtype": recipe.dtype} if recipe.answer_engine == "llamacpp" else {}

    def _check_modes(self, experts: Chain) -> None:
        for mode in self.recipe.answer.modes:
            self.scheme.check_mode(mode, experts)

    def _engine(self) -> Engine:
        if self.recipe.engine == "vllm":
            from mote.inference.engines.vllm import VllmEngine

            return VllmEngine(self.recipe.model, self.recipe.revision, self.recipe.dtype)
        if self.recipe.engine == "llamacpp":
            return self._llamacpp_engine()
        if self.recipe.engine != "transformers":
            from mote.inference.engines.server import ServerEngine

            return ServerEngine(self.recipe.engine, self.recipe.model)
        from mote.inference.engines.local import LocalEngine

        return LocalEngine(self.base(), self.recipe.chains.batch_size)

    def _llamacpp_engine(self) -> Engine:
        from mote.inference.engines.llama_batch import CHAIN_SLOTS, LlamaBatcher
        from mote.inference.engines.llama_files import base_files, check_model, open_base
        from mote.inference.engines.local import LocalEngine

        recipe = self.recipe
        check_model(recipe.model, recipe.revision, recipe.device, recipe.dtype)
        base = open_base(recipe.model, recipe.revision)
        files = base_files(recipe.model, base.tokenizer, recipe.revision, recipe.dtype)
        slots = min(recipe.chains.batch_size, CHAIN_SLOTS)  # more wait in the engine
        return LocalEngine(base, slots, LlamaBatcher(files, slots))

    @asynccontextmanager
    async def _judge(self, engine: Engine) -> AsyncIterator[Judge | QuestionJudge | None]:
        """The judge of the chains' answers; None if the scheme has no check and no other judge is named."""
        scheme = self.scheme
        settings = self.recipe.chains
        name = settings.check
        asked = partial(check_prompt, scheme, settings=settings, seed=self.recipe.seed)
        prompts = scheme.prompts_hash(settings.examples)
        if settings.checks_itself and not scheme.checked:
            yield None
        elif name == "self":
            yield ChoiceJudge(engine, asked, prompts, name, settings.threshold, words=scheme.verdicts)
        elif name in ("kind", "kind+self"):
            from mote.evals.judges.by_kind import KindJudge

            own = ChoiceJudge(engine, asked, prompts, name, words=scheme.verdicts) if name == "kind+self" else None
            yield KindJudge(scheme, own, settings.threshold)
        elif name == "verdict":
            yield WordJudge(engine, asked, prompts, name, words=scheme.verdicts)
        else:
            from mote.evals.judges.open import open_judge

            async with open_judge(name) as judge:
                yield judge


def answer_questions(
    model: "Model", questions: Sequence[Question], mode: str, recipe: Recipe, path: Path, done: set[str]
) -> None:
    """Append the answers that are missing, in fixed batches, so that an interrupted run ends with the same rows.

    Args:
        model: Answers.
        questions: All questions.
        mode: The mode.
        recipe: Its `answer` and `seed` are used.
        path: The answers file.
        done: Ids of the questions that it answers already.
    """
    settings = recipe.answer
    for start in range(0, len(questions), settings.batch_size):
        batch = [question for question in questions[start : start + settings.batch_size] if question.id not in done]
        if batch:
            answers = model.answer_questions(
                batch,
                mode,
                Limits(settings.max_step_tokens),
                Sampling(settings.temperature, settings.top_p, recipe.seed),
                check_threshold=settings.check_threshold,
                system=settings.system,
            )
            append_rows(path, answers)


def _chains_of_settings(path: Path, settings: dict[str, Any]) -> Path:
    """Where chains of other settings are kept, beside `path`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return path.with_name(f"chains-{digest[:8]}.jsonl")


def _hash_of(rows: Sequence[ChainRow]) -> str:
    """Hash of what is trained on; not of the seconds that a chain took."""
    texts = [(row.id, row.accepted, [step.model_dump() for step in row.steps]) for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
