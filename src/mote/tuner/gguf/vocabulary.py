"""A tokenizer as GGUF metadata: tokens, their types, merges, special ids and the chat template.

The step markers are tokens of type NORMAL that no merge produces, so text never becomes one. llama.cpp looks for tokens
of type CONTROL and USER_DEFINED in every text of a chat: a user could type them (docs/decisions/0045).
"""

import json
from typing import Any

from gguf import TokenType

from mote.core.errors import UserError
from mote.core.scheme import end_marker, start_marker
from mote.tuner.config import MoteConfig
from mote.tuner.gguf.source import Experts

MARKERS = "mote.markers"  # metadata: step -> ids of its start and end marker, as JSON
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_CONTRACTIONS}{_WORDS}\p{{N}}{{1,3}}{_REST}"
# What byte-level pre-tokenizers split at and whether words that are tokens skip the merges -> llama.cpp's name.
_PRE_TOKENIZERS = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((rf"{_CONTRACTIONS}{_WORDS}\p{{N}}{_REST}",), False): "qwen2",
    ((_THREE_DIGITS,), True): "llama-bpe",
    ((_THREE_DIGITS,), False): "dbrx",
}
# Steps whose start marker llama.cpp takes for the end of a text or another control token of its own, by its name.
_RESERVED = {
    "end", "return", "call", "flush", "calls", "eot_id", "eom_id", "im_end", "endoftext", "end_of_text", "prefix",
    "suffix", "middle", "code_prefix", "code_suffix", "code_middle", "fim_prefix", "fim_suffix", "fim_middle",
    "fim_pad", "fim_repo", "fim_sep", "repo_name", "file_sep", "file_separator",
}  # fmt: skip


def check_vocabulary(tokenizer: Any, trained: Experts | None) -> None:
    """Check that a tokenizer can be written and that no text becomes one of the markers.

    Args:
        tokenizer: The tokenizer.
        trained: The adapter, if there is one.

    Raises:
        UserError: llama.cpp has no name for how it splits text, or a step has a name that llama.cpp reserves.
    """
    _pre_tokenizer(tokenizer)
    for step in trained.config.experts if trained else ():
        if step in _RESERVED:
            raise UserError(
                f"scheme: llama.cpp takes every token '{start_marker(step)}' for one of its own control tokens; give "
                f"the step '{step}' another name and train again"
            )


def add_vocabulary(writer: Any, tokenizer: Any, rows: int, trained: Experts | None) -> None:
    """Add a tokenizer to a file's metadata.

    Args:
        writer: A `GGUFWriter`.
        tokenizer: The tokenizer.
        rows: Rows of the embedding; those beyond the tokenizer's tokens are tokens that no text becomes.
        trained: The adapter, for its markers and the end of its turns.
    """
    config = trained.config if trained else None
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    texts = {id_: text for text, id_ in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    markers = {id_ for pair in config.markers.values() for id_ in pair} if config else set()
    types = []
    for id_ in range(rows):
        if id_ not in texts:
            types.append(TokenType.UNUSED)
        elif id_ in markers or id_ not in added:
            types.append(TokenType.NORMAL)
        else:
            types.append(TokenType.CONTROL if added[id_].special else TokenType.USER_DEFINED)
    writer.add_token_list([texts.get(id_, f"[unused{id_}]") for id_ in range(rows)])
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special_ids(writer, tokenizer, config)
    template = tokenizer.get_chat_template()
    writer.add_chat_template(answers_only(template, trained.answer) if trained else template)
    if config:
        writer.add_string(MARKERS, json.dumps(config.markers))


def _add_special_ids(writer: Any, tokenizer: Any, config: MoteConfig | None) -> None:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": config.end_of_turn if config else None,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    for name, id_ in ids.items():
        if id_ is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])


def answers_only(template: str, answer: str) -> str:
    """A chat template that shows only the step `answer` of earlier replies, as `mote` does."""
    return _ANSWERS_ONLY.format(start=start_marker(answer), end=end_marker(answer)) + template


_ANSWERS_ONLY = """\
{{%- set answers = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' and message['content'] is string -%}}
{{%- set text = message['content'].split('{start}')[-1].split('{end}')[0] -%}}
{{%- set answers.messages = answers.messages + [{{'role': 'assistant', 'content': text}}] -%}}
{{%- else -%}}
{{%- set answers.messages = answers.messages + [message] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = answers.messages -%}}
"""


def _pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer splits text.

    Raises:
        UserError: It has none that is known here.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = content["pre_tokenizer"] or {}
    splits = tuple(_split(step) for step in (pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]))
    found = tuple(split for split in splits if split)
    name = _PRE_TOKENIZERS.get((found, bool(content["model"].get("ignore_merges"))))
    if content["model"]["type"] != "BPE" or content["normalizer"] not in (None, {"type": "NFC"}) or name is None:
        raise UserError(
            f"adapter: how its tokenizer ({type(tokenizer).__name__}) splits text has no known name in llama.cpp; use "
            "`mote answer` or --format merged"
        )
    return name


def _split(step: dict[str, Any]) -> str:
    """What a step of a pre-tokenizer splits at; empty if at nothing."""
    kind = step.get("type")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", "unknown"))
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt-2" if step["use_regex"] else ""
    return f"unknown {kind}"
