"""Local safety classifiers (Llama Guard, WildGuard, HarmBench, StrongREJECT), scored by the logits of their verdict."""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mote.chains.judge import JudgeCard, Verdict, unparsed
from mote.core.errors import UserError
from mote.core.records import Message
from mote.evals.judges.formats import Format, disarm, load_formats
from mote.models.load import Base, fingerprint, load_base


@dataclass
class _PendingVerdict:
    """A question and an answer that wait for their verdict."""

    question: Sequence[Message]
    answer: str
    verdict: "asyncio.Future[Verdict]"


class ClassifierJudge:
    """A classifier in this process; concurrent calls are judged in batches.

    Args:
        family: One of `mote.evals.judges.formats.load_formats`.
        base: Its weights and tokenizer (`load_classifier`).
        batch_size: Maximum number of answers in a batch.

    Raises:
        UserError: The weights do not belong to this family.
    """

    def __init__(self, family: str, base: Base, batch_size: int = 8) -> None:
        self.format = load_formats()[family]
        _check(self.format, base)
        self._base = base
        self._batch_size = batch_size
        self._waiting: list[_PendingVerdict] = []
        self._worker: asyncio.Task[None] | None = None
        self._ids = _word_ids(base.tokenizer, tuple(self.format.words))
        revision = getattr(base.model.config, "_commit_hash", None) or fingerprint(base.model)
        prompts = self.format.sha256
        self.card = JudgeCard(
            name=f"{family}:{base.name}",
            revision=revision,
            prompts=prompts,
            measures=self.format.measures,
            scale=self.format.scale,
        )

    async def judge(self, question: Sequence[Message], answer: str) -> Verdict:
        """See `Judge.judge`."""
        pending = _PendingVerdict(question, answer, asyncio.get_running_loop().create_future())
        self._waiting.append(pending)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await pending.verdict

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(0)  # lets all callers of this iteration of the event loop join the batch
            if not self._waiting:
                return
            batch = self._waiting[: self._batch_size]
            self._waiting = self._waiting[self._batch_size :]
            try:
                verdicts = await asyncio.to_thread(self.verdicts, [(row.question, row.answer) for row in batch])
            except Exception as error:
                for pending in batch:
                    if not pending.verdict.done():
                        pending.verdict.set_exception(error)
                continue
            for pending, verdict in zip(batch, verdicts, strict=True):
                if not pending.verdict.done():
                    pending.verdict.set_result(verdict)

    def text(self, question: Sequence[Message], answer: str) -> str:
        """The classifier's input."""
        tokenizer = self._base.tokenizer
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        disarmed = functools.partial(disarm, special=special)
        answer = disarmed(self._truncate(answer.strip()))
        if self.format.template:
            return self.format.render(disarmed(question[-1].content), answer)
        turns = [{"role": m.role, "content": disarmed(m.content)} for m in question if m.role != "system"]
        return _chat_text(tokenizer, [*turns, {"role": "assistant", "content": answer}])

    @torch.inference_mode()
    def verdicts(self, rows: Sequence[tuple[Sequence[Message], str]]) -> list[Verdict]:
        """Judge one batch; each verdict is read from the logits at the position of the verdict word."""
        tokenizer = self._base.tokenizer
        bos = tokenizer.bos_token or ""
        encoded = []
        for question, answer in rows:
            text = self.text(question, answer)
            text = text.removeprefix(bos) if bos else text
            encoded.append(tokenizer(text)["input_ids"])
        ids, mask = _pad(encoded, tokenizer.pad_token_id, self._base.model.device)
        out = self._base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.format.max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        generated_BT = out.sequences[:, ids.shape[1] :]
        return [self._read(generated_BT[row], [step[row] for step in out.logits]) for row in range(len(rows))]

    def _read(self, generated_T: Tensor, logits: Sequence[Tensor]) -> Verdict:
        """Read the verdict of one row; unparsed if the token at its position is not one of the verdict words.

        Args:
            generated_T: Generated ids (T,).
            logits: Logits (V,) of each generated token.
        """
        tokenizer = self._base.tokenizer
        raw = tokenizer.decode(generated_T, skip_special_tokens=True).strip()
        for index in range(len(logits)):
            preceding = tokenizer.decode(generated_T[:index], skip_special_tokens=True).strip()
            word = tokenizer.decode(generated_T[index]).strip()
            if not word or (self.format.before and not preceding.endswith(self.format.before)):
                continue
            if not any(int(generated_T[index]) in ids for ids in self._ids.values()):
                break
            log_mass = {name: torch.logsumexp(logits[index][ids].float(), 0) for name, ids in self._ids.items()}
            probabilities = torch.stack(list(log_mass.values())).softmax(0).tolist()
            score = sum(p * self.format.words[name] for name, p in zip(log_mass, probabilities, strict=True))
            return Verdict(label=self.format.label(score), score=score, raw=raw, parsed=True)
        return unparsed(raw)

    def _truncate(self, answer: str) -> str:
        limit = self.format.max_answer_tokens
        tokenizer = self._base.tokenizer
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[:limit])) if limit and len(ids) > limit else answer


def load_classifier(name: str, device: str = "auto", dtype: str = "auto") -> Base:
    """Load a classifier: a full model, or a LoRA (a folder with only `adapter_config.json`) on its base model.

    Raises:
        UserError: It cannot be loaded.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return load_base(name, device, dtype)
    from peft import PeftConfig, PeftModel

    base = load_base(PeftConfig.from_pretrained(name).base_model_name_or_path, device, dtype)
    return Base(name=name, model=PeftModel.from_pretrained(base.model, name).eval(), tokenizer=base.tokenizer)


def _check(form: Format, base: Base) -> None:
    found = base.model.config.model_type
    if found not in form.model_types:
        raise UserError(
            f"judge: '{base.name}' is a {found} model, {form.name} is one of {list(form.model_types)}; give the "
            f"weights of a {form.name} classifier"
        )
    if not form.template and "unsafe" not in (base.tokenizer.chat_template or ""):
        raise UserError(
            f"judge: the chat template of '{base.name}' does not ask for safe or unsafe, so it is no {form.name}; give "
            "the weights of one"
        )


def _chat_text(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """The dialogue in the tokenizer's chat template."""
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    if turns[-1]["content"] not in text:  # templates of multimodal models take lists of parts
        parts = [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns]
        text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=False)
    return text


def _word_ids(tokenizer: Any, words: tuple[str, ...]) -> dict[str, list[int]]:
    """Token ids of each word, ignoring case and spaces; if no token is the whole word, those that are its prefix."""
    whole: dict[str, list[int]] = {word: [] for word in words}
    prefix: dict[str, list[int]] = {word: [] for word in words}
    for id_ in range(len(tokenizer)):
        text = tokenizer.decode([id_]).strip().lower()
        if text in whole:
            whole[text].append(id_)
        elif len(starts := [word for word in words if text and word.startswith(text)]) == 1:
            prefix[starts[0]].append(id_)
    return {word: whole[word] or prefix[word] for word in words}


def _pad(encoded: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Left-padded ids and attention mask, both (B, T)."""
    longest = max(map(len, encoded))
    padding = [longest - len(ids) for ids in encoded]
    rows = [[pad] * count + ids for count, ids in zip(padding, encoded, strict=True)]
    mask = [[0] * count + [1] * (longest - count) for count in padding]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
