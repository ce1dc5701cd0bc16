"""Chains -> a folder that `datasets.load_dataset` reads, with a card, and its way to the Hugging Face hub."""

from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from mote.chains.stats import ChainStats, chain_stats, chains_file, table
from mote.core.errors import MoteError, UserError
from mote.core.files import atomic_folder, check_new, write_atomic
from mote.core.records import ChainRow, iter_rows

_BATCH = 1000  # rows of a row group
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_CARD = """
# Reasoning chains

{accepted} questions, each with a chain of reasoning steps that counts as safe and breaks no quality rule; {others} more
are left out. They were written by {models} and exported with
[mote](https://pypi.org/project/mote-align/), an implementation of *Mixture of insighTful Experts* (ACL 2025).

**Some questions are harmful or offensive.** They are here so that a model learns to answer them safely.

```python
from datasets import load_dataset

chains = load_dataset("{name}", split="train")
print(chains[0]["messages"][-1]["reasoning_content"])
```

| Column | What it holds |
|---|---|
| `id`, `kind`, `source` | of the question: its name, `harmful`, `benign` or `unknown`, and where it comes from |
| `messages` | the dialogue with its answer; the last turn's `reasoning_content` is all steps before the answer |
| `steps` | the chain step by step: `name` and `text`; the last one is the answer |
| `checks` | every answer that was tried: `depth`, `answer`, `safe` and the judged probability `score` |
| `model`, `prompts`, `seed` | who wrote the chain, the hash of the prompts, the seed |

## Numbers

Of all chains, those that are left out too:

```text
{table}
```
"""


def export_dataset(path: Path, out: Path, licence: str = "unknown", name: str | None = None) -> ChainStats:
    """Write the accepted chains as parquet, beside a card with their numbers; there as a whole or not at all.

    Args:
        path: `chains.jsonl`, or the run folder of one.
        out: Folder to make.
        licence: Of the rows, as the hub names licences; for the card.
        name: What the card loads; the folder where none is given.

    Returns:
        The numbers of the card.

    Raises:
        UserError: The folder is there, no chain is accepted, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("export: datasets is not installed; pip install 'mote-align[data]'") from error
    check_new(out)
    stats = chain_stats(path)
    if not stats.accepted:
        raise UserError(f"chains: none of the {stats.total} chains of {stats.path} is accepted; nothing to export")
    rows = (_row(row) for row in iter_rows(chains_file(path), ChainRow) if row.accepted)
    with atomic_folder(out) as folder:
        (folder / "data").mkdir()
        schema = _schema(pyarrow)
        with pyarrow.parquet.ParquetWriter(folder / "data" / "train-00000-of-00001.parquet", schema) as sink:
            while batch := list(islice(rows, _BATCH)):
                sink.write_table(pyarrow.Table.from_pylist(batch, schema))
        write_atomic(folder / "README.md", _card(stats, name or out.name, licence))
    return stats


def push_dataset(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the Hugging Face hub in one commit, with the token of `hf auth login` or HF_TOKEN.

    Args:
        folder: What `export_dataset` wrote.
        repository: `user/name` of the dataset repository, made where it is not there.
        private: Make it private, where it is made.

    Returns:
        The commit's address.

    Raises:
        MoteError: The hub refused it, or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    unreachable: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or of its successor

    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, commit_message="Reasoning chains"
        )
    except errors.HFValidationError as error:
        raise UserError(f"push: '{repository}' is not a repository ({error}); write user/name") from error
    except (unreachable, errors.OfflineModeIsEnabled, OSError) as error:
        said = str(error).strip().splitlines()
        raise MoteError(
            f"push: {repository} did not take it ({said[0] if said else type(error).__name__}); check the token "
            f"(`hf auth login` or HF_TOKEN) and the network; {folder} is there and can be uploaded again"
        ) from error
    return str(done.commit_url)


def _row(chain: ChainRow) -> dict[str, Any]:
    *before, answer = chain.steps
    turns = [{"role": turn.role, "content": turn.content, "reasoning_content": None} for turn in chain.messages]
    reasoning = "\n\n".join(step.text for step in before) or None
    turns.append({"role": "assistant", "content": answer.text, "reasoning_content": reasoning})
    kept = chain.model_dump(include={"id", "kind", "source", "steps", "checks", "model", "prompts", "seed"})
    return kept | {"messages": turns}


def _schema(pyarrow: Any) -> Any:
    text, number = pyarrow.string(), pyarrow.float64()

    def rows(**fields: Any) -> Any:
        return pyarrow.list_(pyarrow.struct(list(fields.items())))

    return pyarrow.schema(
        {
            "id": text,
            "kind": text,
            "source": text,
            "messages": rows(role=text, content=text, reasoning_content=text),
            "steps": rows(name=text, text=text),
            "checks": rows(depth=text, answer=text, safe=pyarrow.bool_(), score=number),
            "model": text,
            "prompts": text,
            "seed": pyarrow.int64(),
        }
    )


def _card(stats: ChainStats, name: str, licence: str) -> str:
    head = {
        "license": licence,
        "task_categories": ["text-generation"],
        "tags": ["safety", "reasoning", "self-alignment", "mote"],
        "size_categories": [next((size for most, size in _SIZES if stats.accepted < most), "n>1M")],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]},
        ],
    }
    text = _CARD.format(
        accepted=stats.accepted,
        others=stats.total - stats.accepted,
        models=", ".join(f"`{model}`" for model in stats.models),
        name=name,
        table=table(stats),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{text}"
