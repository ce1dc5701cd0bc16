"""A small sentencepiece tokenizer, as Llama 2 and Mistral have it."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def save_sentencepiece(folder: Path, legacy: bool) -> Any:
    """Train it on a few words and save it: with a space before every text (`legacy`), or before the first only."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = [
        "how",
        "do",
        "I",
        "kill",
        "a",
        "process",
        "on",
        "my",
        "computer",
        "safe",
        "unsafe",
        "analysis",
        "answer",
        "response",
    ]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=340, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, num_threads=1,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    vocab = {pieces.id_to_piece(id_): id_ for id_ in range(len(pieces))}
    merged = [piece for piece in vocab if len(piece) > 1 and not pieces.is_byte(vocab[piece]) and vocab[piece] > 2]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in merged
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        chat_template=LLAMA2,
    ).save_pretrained(folder)  # fmt: skip
    return AutoTokenizer.from_pretrained(folder)
