"""A tokenizer as GGUF metadata: tokens, their types, merges, special ids and the chat template.

The step markers are tokens of type NORMAL that no merge produces, so text never becomes one. llama.cpp looks for tokens
of type CONTROL and USER_DEFINED in every text of a chat: a user could type them (docs/decisions/0045).
"""

import json
import re
from typing import Any

from gguf import TokenType

from mote.core.errors import UserError
from mote.core.scheme import end_marker, start_marker
from mote.tokens.encode import opening_id, special_ids
from mote.tuner.config import MoteConfig
from mote.tuner.gguf.source import Experts

MARKERS = "mote.markers"  # metadata: step -> ids of its start and end marker, as JSON
_MARKER_TYPE = TokenType.NORMAL
_BYTE = re.compile("<0x[0-9A-F]{2}>")
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
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if _sentencepiece(content) is None:
        _pre_tokenizer(tokenizer)
    else:
        _check_pieces(content["model"], trained)
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
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {id_: text for text, id_ in tokenizer.get_vocab().items()}
    writer.add_token_list([texts.get(id_, f"[unused{id_}]") for id_ in range(rows)])
    writer.add_token_types(_token_types(tokenizer, texts, rows, config))
    opening = opening_id(tokenizer)
    if (space := _sentencepiece(content, opening in special_ids(tokenizer))) is not None:
        ranks = merge_ranks(content["model"])
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(space)
        # A piece that no merge produces is never looked up, so its score does not matter.
        writer.add_token_scores([-float(ranks.get(texts.get(id_, ""), len(ranks))) for id_ in range(rows)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
        writer.add_token_merges([" ".join(pair) for pair in merge_pairs(content["model"])])
    _add_special_ids(writer, tokenizer, config)
    template = tokenizer.get_chat_template()
    writer.add_chat_template(answers_only(template, trained.answer) if trained else template)
    if config:
        writer.add_string(MARKERS, json.dumps(config.markers))


def _token_types(tokenizer: Any, texts: dict[int, str], rows: int, config: MoteConfig | None) -> list[TokenType]:
    """The type of each token; a marker is an ordinary one, which llama.cpp does not look for in texts."""
    added = tokenizer.added_tokens_decoder
    markers = {id_ for pair in config.markers.values() for id_ in pair} if config else set()
    types = []
    for id_ in range(rows):
        text = texts.get(id_)
        if text is None:
            types.append(TokenType.UNUSED)
        elif id_ in markers:
            types.append(_MARKER_TYPE)
        elif id_ == tokenizer.unk_token_id:
            types.append(TokenType.UNKNOWN)
        elif id_ in added:
            types.append(TokenType.CONTROL if added[id_].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL)
    return types


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


def _sentencepiece(content: dict[str, Any], opens_special: bool = False) -> bool | None:
    """Whether a sentencepiece tokenizer puts a space before each text; None for other tokenizers.

    llama.cpp can put one before every text between special tokens, or before none.

    Args:
        content: The tokenizer's file.
        opens_special: Whether chats begin with a special token, so that a space before the first text only is never
            seen.
    """
    if content["model"]["type"] != "BPE" or not content["model"].get("byte_fallback"):
        return None
    normalizer, pre = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    kinds = [step.get("type") for step in steps]
    if pre.get("type") == "Metaspace" and not pre.get("split", True) and kinds == [None]:
        return bool(pre["prepend_scheme"] == "always" or (pre["prepend_scheme"] == "first" and not opens_special))
    if kinds == ["Prepend", "Replace"] and not pre:
        return True
    return False if kinds == ["Replace"] and pre.get("type") in (None, "Split") else None


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, the first one first."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def merge_ranks(model: dict[str, Any]) -> dict[str, int]:
    """Piece -> how many pieces are merged before it."""
    return {piece: rank for rank, piece in enumerate(dict.fromkeys(a + b for a, b in merge_pairs(model)))}


def _check_pieces(model: dict[str, Any], trained: Experts | None) -> None:
    """Check that merging by resulting piece (sentencepiece, llama.cpp) equals merging by pairs (the tokenizer's file).

    Raises:
        UserError: It does not, or a marker is a piece that can be merged.
    """
    pairs = merge_pairs(model)
    ranks = merge_ranks(model)
    order = [ranks[a + b] for a, b in pairs]
    known = model["vocab"].keys()
    given = set(pairs)
    splits = ((piece[:i], piece[i:]) for piece in ranks for i in range(1, len(piece)))
    if order != sorted(order) or any(a in known and b in known and (a, b) not in given for a, b in splits):
        raise UserError(
            "adapter: its tokenizer merges pieces in an order that llama.cpp cannot follow; use `mote answer` or "
            "--format merged"
        )
    names = [name(step) for step in (trained.config.experts if trained else ()) for name in (start_marker, end_marker)]
    for text in names:
        if any(text[:i] in known and text[i:] in known for i in range(1, len(text))):
            raise UserError(
                f"adapter: llama.cpp would merge user text into the marker {text}; give the step another name"
            )


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
    """What a step of a pre-tokenizer splits at; empty if it does not split."""
    kind = step.get("type")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", "unknown"))
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt-2" if step["use_regex"] else ""
    return f"unknown {kind}"
