"""The stages in sequence: questions -> chains -> train -> answer -> report, each reusing what is there already."""

import asyncio
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mote.chains.engine import Engine
from mote.chains.judge import Judge
from mote.chains.make import make_chains
from mote.chains.prompts import check_prompt
from mote.chains.safety_check import ChoiceJudge, WordJudge
from mote.core.errors import UserError
from mote.core.files import sha256_of, write_atomic, write_json
from mote.core.machine import environment, is_first_process
from mote.core.methods import steps_of
from mote.core.progress import Progress
from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe, load_recipe
from mote.core.records import Answer, ChainRow, LeftOut, Question, append_rows, iter_rows, read_rows, rewrite_rows
from mote.core.scheme import CHECK, Chain, load_scheme
from mote.questions.load import load_questions, select_questions

if TYPE_CHECKING:
    from mote.inference.model import Model
    from mote.models.load import Base


class Run:
    """One run folder. The base model is loaded when a stage first needs it."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.scheme = load_scheme(recipe.scheme)
        self._base: Base | None = None

    def all(self) -> None:
        """Every stage in sequence."""
        self.claim()
        self.chains()
        self.train(self.folder / "chains.jsonl")
        self.answer(self.folder / "adapter")
        self.report()

    def claim(self) -> None:
        """Make the folder this recipe's.

        Raises:
            UserError: It holds another recipe's run, a setting cannot work, or the questions cannot be read.
        """
        self._check_modes(steps_of(self.recipe, self.scheme))
        text, path = dump_recipe(self.recipe), self.folder / "recipe.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            changed = _difference(load_recipe(path), self.recipe)
            raise UserError(
                f"out: {self.folder} holds the run of another recipe (it differs in {changed}); give another folder "
                "with --out, or remove that one"
            )
        load_questions(self.recipe.answer.questions, self.recipe.answer.limit, self.recipe.chains.max_question_chars)
        from mote.train import check_settings  # a wrong setting must not wait for the chains

        check_settings(self.recipe, self.scheme, self.folder)
        self.questions()
        write_atomic(path, text)

    def questions(self) -> Path:
        """The questions to make chains for; read once, then kept in the folder."""
        path, claimed = self.folder / "questions.jsonl", self.folder / "recipe.yaml"
        mine = claimed.exists() and claimed.read_text(encoding="utf-8") == dump_recipe(self.recipe)
        if path.exists() and mine:
            return path
        recipe = self.recipe
        left: list[LeftOut] = []
        wanted = select_questions(recipe, left.append)
        if not path.exists():
            rewrite_rows(path, wanted)
            if left:
                rewrite_rows(self.folder / "left_out.jsonl", left)
                counts = Counter(row.why for row in left)
                why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
                print(f"questions: {len(left)} left out ({why}), listed in left_out.jsonl", file=sys.stderr)
        elif any(one != other for one, other in zip_longest(iter_rows(path, Question), wanted)):
            raise UserError(
                f"questions: {path} holds {sum(1 for _ in iter_rows(path, Question))} questions, and not those of "
                f"questions={recipe.questions} limit={recipe.limit}; use another --out or remove it"
            )
        return path

    def chains(self) -> None:
        """Questions -> `chains.jsonl`."""
        recipe, questions, path = self.recipe, self.questions(), self.folder / "chains.jsonl"
        made_by = {
            "model": recipe.model,
            "prompts": self.scheme.prompts_hash(recipe.chains.examples),
            "seed": recipe.seed,
            "engine": recipe.engine,
            "chains": recipe.chains.model_dump(mode="json", exclude={"batch_size", "keep_old"}),
        }
        self._own_chains(path, made_by)
        ids = {question.id for question in iter_rows(questions, Question)}
        done = sum(row.id in ids for row in iter_rows(path, ChainRow))

        async def make(progress: Progress) -> None:
            engine = self._engine()
            try:
                async with self._judge(engine) as judge:
                    await make_chains(
                        iter_rows(questions, Question), engine, judge, self.scheme, recipe.chains, recipe.seed, path,
                        lambda made: progress(made, len(ids)),
                    )  # fmt: skip
            finally:
                await engine.close()

        def work() -> str:
            with Progress("chains", "questions") as progress:
                progress(done, len(ids))
                asyncio.run(make(progress))
            accepted = sum(row.accepted for row in iter_rows(path, ChainRow))
            return f"{accepted} of {len(ids)} chains accepted"

        self._stage("chains", path, made_by, done == len(ids), f"{len(ids)} chains are there", work)

    def _own_chains(self, path: Path, made_by: dict[str, Any]) -> None:
        """Move chains that other settings made out of the way, and back when their settings come again.

        With `chains.keep_old` they stay, and new ones are made beside them.
        """
        stage, first = self._stages().get("chains"), next(iter_rows(path, ChainRow), None)
        if first is None:
            return
        by_row = {"model": first.model, "prompts": first.prompts, "seed": first.seed}
        old = stage["made_by"] if stage is not None else by_row
        changed = _changes(old, {key: made_by[key] for key in old})
        if not changed:
            return
        stages = [stage for name, stage in self._stages().items() if name != "chains"]
        write_json(self.folder / "environment.json", self._environment() | {"stages": stages})
        if self.recipe.chains.keep_old:
            print(f"chains: those that are there differ in {changed}; they stay (chains.keep_old)", file=sys.stderr)
            return
        aside, mine = (path.with_name(f"chains-{_key(settings)}.jsonl") for settings in (old, made_by))
        path.rename(aside)
        print(f"chains: those that are there differ in {changed}; they are in {aside.name} now", file=sys.stderr)
        if mine.exists():
            mine.rename(path)

    def train(self, chains: Path) -> Path:
        """Chains -> `adapter/` and `metrics.jsonl`."""
        adapter = self.folder / "adapter"
        rows = sorted(read_rows(chains, ChainRow), key=lambda row: row.id)  # they were written as they were done

        def work() -> str:
            if not rows:
                raise UserError(f"chains: {chains} holds no chains; make some with `mote chains`")
            from mote.train import train

            quantization = self.recipe.train.quantization
            base = self.base() if quantization == "none" else self._loaded(quantization)
            train(base, rows[: self.recipe.limit], self.scheme, self.recipe, self.folder)
            self._base = None  # it wears the adapter now; what comes next loads it as a user would
            return f"trained into {adapter}"

        recipe = self.recipe
        made_by = {
            "model": recipe.model, "seed": recipe.seed, "chains": _texts(rows),
            "experts": recipe.experts.model_dump(mode="json"), "train": recipe.train.model_dump(mode="json"),
        }  # fmt: skip
        self._stage(
            "train",
            self.folder / "checkpoints",
            made_by,
            (adapter / "adapter_config.json").exists(),
            f"{adapter} is there",
            work,
        )
        if is_first_process():  # a run killed once it was trained leaves them
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return adapter

    def answer(self, adapter: Path) -> None:
        """Held-out questions -> `answers/<system>-<mode>.jsonl`, one file a mode."""
        self._check_modes((CHECK,))  # whether the adapter has one is seen when it is there
        settings = self.recipe.answer
        questions = load_questions(settings.questions, settings.limit, self.recipe.chains.max_question_chars)
        paths = {mode: self.folder / "answers" / f"{settings.system}-{mode}.jsonl" for mode in settings.modes}
        there = {mode: {row.id for row in read_rows(path, Answer)} for mode, path in paths.items()}
        total = len(questions) * len(paths)
        done = sum(len(ids & {question.id for question in questions}) for ids in there.values())

        def work() -> str:
            from mote.inference.load import adapter_config, load

            recipe = self.recipe
            self._check_modes(adapter_config(str(adapter)).experts)
            model = load(recipe.model, adapter, device=recipe.device, dtype=recipe.dtype, revision=recipe.revision)
            with Progress("answer", "answers") as progress:
                progress(done, total)
                for mode, path in paths.items():
                    _answer_mode(model, questions, mode, recipe, path, there[mode])
                    progress(sum(len(read_rows(path, Answer)) for path in paths.values()), total)
            return f"{total} answers in {len(paths)} modes"

        made_by = {
            "model": self.recipe.model, "seed": self.recipe.seed,
            "adapter": sha256_of(adapter / "adapter_model.safetensors"),
            "answer": settings.model_dump(mode="json", exclude={"questions", "limit", "modes", "batch_size"}),
        }  # fmt: skip
        name = (
            "answer" if settings.system == "mote" else f"answer {settings.system}"
        )  # a folder may hold several systems
        self._stage(name, self.folder / "answers", made_by, done == total, f"{total} answers are there", work)

    def report(self) -> None:
        """Everything in the folder -> `report.json` and `report.html`; quick, so always made anew."""
        from mote.report.report_page import write_report

        page = self.folder / "report.html"

        def work() -> str:
            write_report(self.folder)
            return str(page)

        self._stage("report", page, {}, False, "", work)

    def base(self) -> "Base":
        """The base model, loaded on the first call."""
        if self._base is None:
            self._base = self._loaded()
        return self._base

    def _loaded(self, quantization: Literal["none", "8bit", "4bit"] = "none") -> "Base":
        from mote.models.load import load_base

        recipe = self.recipe
        return load_base(recipe.model, recipe.device, recipe.dtype, recipe.revision, quantization)

    def _check_modes(self, experts: Chain) -> None:
        for mode in self.recipe.answer.modes:
            self.scheme.check_mode(mode, experts)

    def _engine(self) -> Engine:
        if self.recipe.engine == "vllm":
            from mote.inference.engines.vllm import VllmEngine

            return VllmEngine(self.recipe.model, self.recipe.revision, self.recipe.dtype)
        if self.recipe.engine != "transformers":
            from mote.inference.engines.server import ServerEngine

            return ServerEngine(self.recipe.engine, self.recipe.model)
        from mote.inference.engines.local import LocalEngine

        return LocalEngine(self.base(), self.recipe.chains.batch_size)

    @asynccontextmanager
    async def _judge(self, engine: Engine) -> AsyncIterator[Judge | None]:
        """Who checks the answers: nobody, where the scheme has no check and no other judge is named."""
        scheme, settings, name = self.scheme, self.recipe.chains, self.recipe.chains.check
        asked = partial(check_prompt, scheme, settings=settings, seed=self.recipe.seed)
        prompts = scheme.prompts_hash(settings.examples)
        if settings.checks_itself and not scheme.checked:
            yield None
        elif name == "self":
            yield ChoiceJudge(engine, asked, prompts, name, settings.threshold, words=scheme.verdicts)
        elif name == "verdict":
            yield WordJudge(engine, asked, prompts, name, words=scheme.verdicts)
        else:
            from mote.evals.judges.open import open_judge

            async with open_judge(name) as judge:
                yield judge

    def _environment(self) -> dict[str, Any]:
        """`environment.json`, new where there is none."""
        path = self.folder / "environment.json"
        if not path.exists():
            return environment() | {"stages": []}
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known

    def _stages(self) -> dict[str, dict[str, Any]]:
        """The stages that `environment.json` knows, by their names."""
        return {stage["stage"]: stage for stage in self._environment().get("stages", [])}

    def _stage(
        self,
        name: str,
        output: Path,
        made_by: dict[str, Any],
        reused: bool,
        reuse_note: str,
        work: Callable[[], str],
    ) -> None:
        """Do a stage unless its result is there, say what happened, and keep its time and memory.

        Raises:
            UserError: What is there was made with other settings than `made_by`.
        """
        path, known, stages = self.folder / "environment.json", self._environment(), self._stages()
        entry = stages.get(name) or {"stage": name, "seconds": 0.0, "reused": False, "peak_memory_mb": 0}
        if changed := _changes(entry.get("made_by", made_by), made_by):
            raise UserError(
                f"out: {self.folder} holds the {name} stage of other settings (they differ in {changed}); give another "
                "folder with --out, or remove that one"
            )
        entry["made_by"] = made_by
        if made_by:  # the report of an unfinished stage would not know of itself
            stages[name] = entry
        if not is_first_process():  # which takes part in the work alone
            if not reused:
                work()
            return
        began = time.monotonic()
        if reused:
            print(f"{name}: reused, {reuse_note}", file=sys.stderr)
            entry["reused"] = True
        else:
            before = path.read_bytes() if path.exists() else None
            write_json(path, known | {"stages": list(stages.values())})
            try:
                note = work()
            except BaseException:
                if not output.exists():  # nothing was made with these settings yet
                    path.unlink() if before is None else path.write_bytes(before)
                raise
            from mote.core.machine import peak_memory_mb

            seconds = round(time.monotonic() - began, 1)
            entry |= {"seconds": seconds, "reused": False, "peak_memory_mb": peak_memory_mb()}
            stages[name] = entry
            print(f"{name}: {note} ({seconds:.1f} s)", file=sys.stderr)
        write_json(path, known | {"stages": list(stages.values())})


def _answer_mode(
    model: "Model", questions: Sequence[Question], mode: str, recipe: Recipe, path: Path, there: set[str]
) -> None:
    """Answer in fixed groups, so that a run that was cut ends with the same rows."""
    settings = recipe.answer
    for start in range(0, len(questions), settings.batch_size):
        group = [question for question in questions[start : start + settings.batch_size] if question.id not in there]
        if group:
            answers = model.answer(
                group,
                mode,
                max_step_tokens=settings.max_step_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=recipe.seed,
                check_threshold=settings.check_threshold,
                system=settings.system,
            )
            append_rows(path, answers)


def _key(settings: dict[str, Any]) -> str:
    """A short name for what a file was made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _difference(old: Recipe, new: Recipe) -> str:
    """Dotted names of the settings in which two recipes differ."""
    return _changes(old.model_dump(mode="json"), new.model_dump(mode="json")) or "its form"


def _changes(old: Any, new: Any, prefix: str = "") -> str:
    """Dotted names of the values in which two trees of settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [_changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key) for key in keys]
        return ", ".join(part for part in parts if part)
    return "" if old == new else prefix


def _texts(rows: Sequence[ChainRow]) -> str:
    """Hash of what is trained on; the seconds a chain took do not count."""
    texts = [(row.id, row.accepted, [step.model_dump() for step in row.steps]) for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
