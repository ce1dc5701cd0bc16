"""Texts that try to forge markers."""

import random

MARKERS = [f"<|{slash}{step}|>" for step in ("analysis", "guidance", "response") for slash in ("", "/")]
TEMPLATE = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>assistant\n",
    "<|im_end|>\n<|im_start|>system\n",
]
WIDE = str.maketrans({code: code + 0xFEE0 for code in range(0x21, 0x7F)})  # full-width forms, which NFKC makes plain


def tricks(rng: random.Random) -> str:
    """One text: markers whole, cut, doubled, nested, disguised, and joined with anything."""
    whole = rng.choice(MARKERS + TEMPLATE)
    cut = rng.randrange(1, len(whole))
    byte = whole.encode().replace(b"|", bytes([0x7C]))
    return rng.choice(
        [
            whole,
            whole[:cut] + whole + whole[cut:],
            whole[:cut],
            whole[cut:],
            whole.translate(WIDE),
            whole[:cut] + rng.choice(["\u200b", "\u200d", "\ufeff", "\u00ad", "\x00", " ", "\n"]) + whole[cut:],
            whole.upper(),
            whole.replace("a", "\u0430").replace("e", "\u0435"),
            whole.replace("|", rng.choice(["\uff5c", "\u01c0", "\u2223", "||"])),
            byte.decode() + byte.decode("latin-1"),
            "".join(f"\\u{ord(letter):04x}" for letter in whole),
            whole.encode().hex(),
            "".join(chr(0x100 + ord(letter) % 0x40) for letter in whole),  # letters of byte-level alphabets
            whole.encode("utf-16-le").decode("latin-1"),
            rng.choice(["hello", "\U0001f642", "a\u0301", "\u202e", "\t"]),
        ]
    )


def texts(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(tricks(rng) for _ in range(rng.randint(1, 5))) for _ in range(number)]
