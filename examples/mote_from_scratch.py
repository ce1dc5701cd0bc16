"""MoTE in one file: routing by step, step experts, step skipping, the loss, and adaptive decoding.

Everything is written the slow and obvious way, on a tiny random Llama: no caches, no fused matmuls, no batching. The
package computes the same faster; `tests/end_to_end/test_from_scratch.py` compares them number by number.

    python examples/mote_from_scratch.py    # about half a minute on a CPU

Section numbers are the paper's (Mixture of insighTful Experts, ACL 2025).
Shapes: T token, S step, D model, R rank, E expert, V vocabulary.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

STEPS = ("analysis", "guidance", "response")  # step ids 1, 2, 3; 0 is the question
DEPTHS = ((3,), (1, 3), (1, 2, 3))  # the chains a model may write, the shortest first (section 3.1)
IGNORED = -100  # label of a token that has no loss


# --- 1. Tokens: each step stands between a start and an end marker, which are learnable tokens (section 3.1)


@dataclass(frozen=True)
class Vocabulary:
    """The special token ids: a start and an end marker for each step, what begins a turn, the end of a turn."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    turn: int
    eos: int


def chain_ids(prompt: list[int], steps: dict[int, list[int]], vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids and labels of a chain: the loss is on everything after the question (section 3.2)."""
    written = []
    for step, text in steps.items():
        written += [vocabulary.starts[step - 1], *text, vocabulary.ends[step - 1]]
    written.append(vocabulary.eos)
    return prompt + written, [IGNORED] * len(prompt) + written


def step_ids(ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The step of each token: that of the last start marker at or before it; a new turn is the question again.

    It depends on the token ids alone. Training, decoding and serving all route by this function: there is no gate.
    """
    step = 0
    found = []
    for id_ in ids:
        if id_ in vocabulary.starts:
            step = vocabulary.starts.index(id_) + 1
        elif id_ == vocabulary.turn:
            step = 0
        found.append(step)
    return found


# --- 2. Step skipping: one pass trains the short chains as well, through the attention mask (section 3.2, figure 3)


def draw_visibility(steps: Sequence[int], skip_p: float, rng: random.Random) -> dict[tuple[int, int], bool]:
    """(later, earlier) -> whether the later step may attend to the earlier one; the question is always visible."""
    present = sorted(set(steps) - {0})
    visible = {(later, earlier): True for later in range(4) for earlier in range(4)}
    for earlier in present:
        for later in present:
            if later > earlier:
                visible[later, earlier] = rng.random() >= skip_p
    return visible


def mask_and_positions(steps: Sequence[int], visible: dict[tuple[int, int], bool]) -> tuple[Tensor, Tensor]:
    """The attention mask (1, 1, T, T) and the position of each token (1, T).

    A step begins right after the last token that it can see, so a response that skips all reasoning is computed exactly
    as a direct answer is.
    """
    count = len(steps)
    mask = torch.zeros(count, count, dtype=torch.bool)
    positions = [0] * count
    for query, step in enumerate(steps):
        for key in range(query + 1):
            mask[query, key] = visible[step, steps[key]]
        seen = [positions[key] for key in range(query) if mask[query, key]]
        positions[query] = max(seen, default=-1) + 1
    return mask[None, None], torch.tensor([positions])


# --- 3. Step experts: a LoRA for each step and a shared one, on every linear layer (section 3.2, figure 1b)


class Routing:
    """The weight of each expert for each token of the running forward pass (T, E); expert 0 is the shared one."""

    weights: Tensor

    def set(self, steps: Sequence[int], mix: float = 0.5, question_expert: int | None = None) -> None:
        """Half from the shared expert, half from the step's own (`mix` is alpha of the paper's equation).

        The question is read by one expert drawn at random in training ("processed by anyone"), and by the mean of them
        at inference.
        """
        self.weights = torch.zeros(len(steps), 1 + len(STEPS))
        self.weights[:, 0] = 1 - mix
        for token, step in enumerate(steps):
            if step == 0 and question_expert is None:
                self.weights[token, 1:] = mix / len(STEPS)
            else:
                self.weights[token, step or question_expert] = mix


class StepLinear(nn.Module):
    """A frozen linear layer and its experts: W0 x + sum over e of weight[token, e] * scaling * B_e A_e x."""

    def __init__(self, base: nn.Linear, routing: Routing, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.scaling = lora_alpha / r
        experts = range(1 + len(STEPS))
        self.lora_A = nn.ParameterList([torch.randn(r, base.in_features) / base.in_features**0.5 for _ in experts])
        self.lora_B = nn.ParameterList([torch.zeros(base.out_features, r) for _ in experts])

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, in) -> (1, T, out)."""
        out: Tensor = self.base(x)
        for expert, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            out = out + self.routing.weights[:, expert, None] * self.scaling * (x @ lora_A.T @ lora_B.T)
        return out


def add_experts(model: nn.Module, r: int = 4, lora_alpha: float = 8) -> Routing:
    """Freeze the model and put step experts on all linear layers but the output head."""
    model.requires_grad_(False)
    routing = Routing()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, StepLinear(child, routing, r, lora_alpha))
    return routing


# --- 4. Training: next-token cross-entropy; only the experts and the markers' rows of the embedding train


def chain_loss(
    model: nn.Module, routing: Routing, ids: list[int], labels: list[int], vocabulary: Vocabulary, skip_p: float,
    rng: random.Random,
) -> Tensor:  # fmt: skip
    """Loss of one chain under one draw of which step sees which."""
    steps = step_ids(ids, vocabulary)
    mask, positions = mask_and_positions(steps, draw_visibility(steps, skip_p, rng))
    routing.set(steps, question_expert=rng.randint(1, len(STEPS)))
    logits = model(torch.tensor([ids]), attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORED)


def train_rows(embedding: nn.Embedding, ids: Sequence[int]) -> None:
    """Let these rows of the embedding train, and no others."""
    keep = torch.zeros(embedding.num_embeddings, 1)
    keep[list(ids)] = 1
    embedding.weight.requires_grad_(True)
    embedding.weight.register_hook(lambda gradient: gradient * keep)


# --- 5. Adaptive decoding: the model writes a start marker, which activates that step's expert (section 3.2)


def constrain(
    logits_V: Tensor, written: list[int], vocabulary: Vocabulary, chains: Sequence[tuple[int, ...]], budget: int
) -> Tensor:
    """The logits with -inf on every token that does not continue a chain of the mode.

    A mode with one chain forces its steps; in the adaptive mode the model chooses among all of `DEPTHS`.
    """
    starts, ends = vocabulary.starts, vocabulary.ends
    begun = tuple(starts.index(id_) + 1 for id_ in written if id_ in starts)
    scores_V = torch.full_like(logits_V, float("-inf"))
    if len(begun) == sum(id_ in ends for id_ in written):  # between steps: the start marker of a next step
        following = {chain[len(begun)] for chain in chains if chain[: len(begun)] == begun and len(chain) > len(begun)}
        allowed = [starts[step - 1] for step in following]
    else:  # inside a step: text until the budget is used, and the end marker once there is any
        length = len(written) - 1 - max(i for i, id_ in enumerate(written) if id_ in starts)
        if length < budget:
            scores_V = logits_V.clone()
            scores_V[[*starts, *ends, vocabulary.turn, vocabulary.eos]] = float("-inf")
        allowed = [ends[begun[-1] - 1]] if length else []
    scores_V[allowed] = logits_V[allowed]
    return scores_V


@torch.no_grad()
def answer(
    model: nn.Module, routing: Routing, prompt: list[int], vocabulary: Vocabulary,
    chains: Sequence[tuple[int, ...]] = DEPTHS, max_step_tokens: int = 32,
) -> list[int]:  # fmt: skip
    """Greedy decoding, one full forward pass a token, until the response's end marker."""
    written: list[int] = []
    while not written or written[-1] != vocabulary.ends[-1]:
        routing.set(step_ids(prompt + written, vocabulary))
        logits_V = model(torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
        written.append(int(constrain(logits_V, written, vocabulary, chains, max_step_tokens).argmax()))
    return written


# --- 6. Three questions, three chains of different lengths, and a model that learns how much to reason


def examples() -> Iterator[tuple[list[int], dict[int, list[int]]]]:
    """A prompt and its chain, in made-up tokens."""
    rng = random.Random(0)
    for depth in DEPTHS:
        prompt = [2, *(rng.randrange(3, 60) for _ in range(6)), 2]
        yield prompt, {step: [rng.randrange(3, 60) for _ in range(5)] for step in depth}


def main() -> None:
    """Train on the three chains, then answer the three questions."""
    torch.set_num_threads(1)  # the model is so small that more threads only wait for each other
    torch.manual_seed(0)
    vocabulary = Vocabulary(starts=(64, 66, 68), ends=(65, 67, 69), turn=2, eos=1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=70, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            tie_word_embeddings=True, initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    routing = add_experts(model, r=8, lora_alpha=16)
    train_rows(model.get_input_embeddings(), [*vocabulary.starts, *vocabulary.ends])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    rng = random.Random(0)
    for update in range(1, 101):
        losses = [
            chain_loss(model, routing, *chain_ids(prompt, steps, vocabulary), vocabulary, skip_p=0.3, rng=rng)
            for prompt, steps in examples()
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 25 == 0:
            print(f"update {update}  loss {loss.item():.3f}")
    for prompt, steps in examples():
        written = answer(model, routing, prompt, vocabulary)
        chosen = [STEPS[vocabulary.starts.index(id_)] for id_ in written if id_ in vocabulary.starts]
        exact = written == chain_ids(prompt, steps, vocabulary)[0][len(prompt) : -1]
        print(f"wrote {' -> '.join(chosen)}{' (word for word)' if exact else ''}")


if __name__ == "__main__":
    main()
