"""Exports a trained adapter for llama.cpp: one GGUF file with all steps, or a base model and a LoRA for each step.

What the files hold is `mote.tuner.gguf`; here they get a folder with tokenizer, grammars, model card and Modelfile.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mote.core.files import atomic_folder, check_new, disk_errors, write_atomic
from mote.core.scheme import ADAPTIVE, Chain, start_marker
from mote.inference.load import Adapter, read_adapter
from mote.serve.export import base_name, check_exportable
from mote.serve.gguf_check import check_file
from mote.serve.modelfile import find_frame, modelfile
from mote.tokens.encode import stop_ids
from mote.tuner.gguf.file import Type, usual_experts
from mote.tuner.gguf.source import BaseWeights
from mote.tuner.gguf.steps import write_steps
from mote.tuner.gguf.switch import write_switch

MODEL = "model.gguf"
_AGAIN = "run the same command again"
# No special token and no marker is spelled without "<|", so a step cannot hold one.
_TEXT = 'text ::= ([^<] | "<"+ [^<|])+'


def export_gguf(
    adapter: str,
    out: Path,
    model: str | None = None,
    quantise: Type = "q8_0",
    experts: Type | None = None,
    revision: str | None = None,
) -> Path:
    """Write OUT/model.gguf with all steps and the base model, for llama.cpp from b10603 on.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to create.
        model: Base model; by default the one that the adapter names.
        quantise: Type of the base model's matrices.
        experts: Type of the experts; by default f16, and f32 with `quantise` f32.
        revision: Hub revision of the base model.

    Returns:
        The folder.

    Raises:
        UserError: `adapter` has no step experts or no tokenizer, `out` exists, the base model does not exist or is not
            the adapter's, or one file cannot compute what the adapter does.
        MoteError: The files cannot be written, or the engine cannot load them.
    """
    trained, base = _opened(adapter, out, model, revision)
    with disk_errors("export", out, _AGAIN), atomic_folder(out) as scratch:
        path = scratch / MODEL
        write_switch(path, trained, base, quantise, experts or usual_experts(quantise))
        scheme = trained.scheme.only(trained.config.experts)
        modes = (*scheme.depths, ADAPTIVE)
        for mode in modes:
            write_atomic(scratch / f"{mode}.gbnf", _mode_grammar(scheme.chains_of(mode), trained.config.markers))
        stops = [trained.tokenizer.decode([id_]) for id_ in stop_ids(trained.tokenizer, base.generation)]
        write_atomic(scratch / "Modelfile", modelfile(MODEL, find_frame(_renderer(trained.tokenizer)), stops))
        check = check_file(path, trained.tokenizer, trained.config.markers)
        card = _CARD.format(
            base=base.name, folder=out, modes=", ".join(modes), check=check, answer=start_marker(scheme.answer)
        )
        _finish(scratch, trained, card)
    return out


def export_gguf_steps(
    adapter: str,
    out: Path,
    model: str | None = None,
    quantise: Type = "q8_0",
    experts: Type | None = None,
    revision: str | None = None,
) -> Path:
    """Write OUT/base.gguf, OUT/question.gguf and OUT/<step>.gguf; arguments and errors as in `export_gguf`."""
    trained, base = _opened(adapter, out, model, revision)
    with disk_errors("export", out, _AGAIN), atomic_folder(out) as scratch:
        files = write_steps(scratch, trained, base, quantise, experts or usual_experts(quantise))
        check = check_file(files.base, trained.tokenizer, trained.config.markers, list(files.loras.values()))
        _finish(scratch, trained, _STEPS_CARD.format(base=base.name, folder=out, adapter=adapter, check=check))
    return out


def _opened(adapter: str, out: Path, model: str | None, revision: str | None) -> tuple[Adapter, BaseWeights]:
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    return trained, BaseWeights(base_name(trained, model), revision or trained.config.revision)


def _finish(scratch: Path, trained: Adapter, card: str) -> None:
    trained.tokenizer.save_pretrained(scratch)
    write_atomic(scratch / "README.md", card)


def _renderer(tokenizer: Any) -> Any:
    def render(dialogue: Any, generate: bool) -> str:
        rows: list[Mapping[str, str]] = [{"role": role, "content": text} for role, text in dialogue]
        text: str = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generate)
        return text

    return render


def _mode_grammar(chains: Iterable[Chain], markers: Mapping[str, Sequence[int]]) -> str:
    """A GBNF grammar that allows these chains; it names markers by id, so text is never one.

    Args:
        chains: The chains of a mode.
        markers: Step -> ids of its start and end marker.
    """
    lines = [" ".join(f"<[{markers[step][0]}]> text <[{markers[step][1]}]>" for step in chain) for chain in chains]
    return f"root ::= {' | '.join(lines)}\n{_TEXT}\n"


_CARD = """---
library_name: gguf
base_model: {base}
tags: [mote, safety, llama.cpp]
---
# `{base}` with step experts, in one GGUF file

All steps of a MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557) in llama.cpp's architecture
`graniteswitch` (b10603 or later): the markers before a token choose the experts that read it. {check}

```bash
llama-server -m {folder}/model.gguf -c 4096 --jinja
curl http://127.0.0.1:8080/v1/chat/completions -d '{{"messages": [{{"role": "user", "content": "How do I ...?"}}]}}'
```

The reply holds every step between its markers; what a reader should see is the step behind `{answer}`. A mode
({modes}) is a grammar: send the content of `MODE.gbnf` as `grammar`. Earlier replies are shown to the model without
their reasoning, which the chat template does by itself.

No text becomes a marker: markers are ordinary tokens that no text is split into, and are written by the model alone or
sent as ids (`mote.markers` in the file's metadata). The other special tokens of the base model, such as those
between turns, can be typed by a user of llama-server, as with every GGUF file.
"""

_STEPS_CARD = """---
library_name: gguf
base_model: {base}
tags: [mote, safety, llama.cpp]
---
# `{base}` with step experts, as GGUF files

`base.gguf` is the base model with the trained rows of the markers; `question.gguf` and the other files are LoRAs: the
experts of a MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557) for the tokens of the question and of each
step. A program that computes what the adapter does applies one of them to each token: `question.gguf` up to the first
start marker, then that of the step. {check}

```bash
mote answer --adapter {adapter} --engine llamacpp --questions questions.jsonl --out answers
```

llama-server cannot switch within a request; with one LoRA on all tokens it answers in the mode of one step:
`llama-server -m {folder}/base.gguf --lora {folder}/response.gguf`.
"""
