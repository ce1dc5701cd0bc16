"""`mote chains stats`, `view`, `import` and `export`: work on existing chains."""

from pathlib import Path

import click

from mote.chains.diversity import TOKENIZERS
from mote.cli.options import file_of, folder_of
from mote.cli.stages import chains

_PATH = click.argument("path", type=click.Path(path_type=Path))


@click.command()
@_PATH
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Also plot shares, outcomes, lengths and tokens to this SVG file."
)
@click.option(
    "--price",
    type=click.FloatRange(min=0),
    nargs=2,
    metavar="PROMPT GENERATED",
    help="US dollars per million prompt tokens and per million generated tokens, to estimate the cost.",
)
@click.option("--sample", type=click.IntRange(min=2), default=200, help="Maximum number of texts for Self-BLEU.")
@click.option("--tokenizer", type=click.Choice(TOKENIZERS), default="13a", help="sacrebleu tokenizer for Self-BLEU.")
def stats(
    path: Path, as_json: bool, plot: Path | None, price: tuple[float, float] | None, sample: int, tokenizer: str
) -> None:
    """Statistics of the chains of PATH, a chains.jsonl or its run folder, beside the paper's numbers."""
    from mote.chains.costs import Price
    from mote.chains.stats import chain_stats, table
    from mote.report.chains_page import plots_of

    if plot is not None:
        file_of(plot, ".svg", "plot")
    token_price = Price(read=price[0], written=price[1]) if price is not None else None
    found = chain_stats(path, token_price, sample, tokenizer)
    if plot is not None:
        from mote.core.files import write_atomic
        from mote.report.plots import standalone

        write_atomic(plot, standalone(plots_of(found)))
    print(found.model_dump_json(indent=2) if as_json else table(found))


@click.command()
@_PATH
@click.option("--out", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
def view(path: Path, out: Path) -> None:
    """Write the chains of PATH as one self-contained HTML page to read and filter."""
    from mote.report.chains_page import write_page

    page = file_of(out, ".html")
    write_page(path, page)
    print(page)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "star1", "messages", "hh-rlhf", "preference"]),
    default="auto",
    help="Layout of the file; auto infers it from the columns.",
)
@click.option("--writer", help="Model that wrote the chains, if the format does not say.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N rows.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
def import_(file: Path, form: str, writer: str | None, limit: int | None, out: Path) -> None:
    """Convert existing answers in FILE to chains -> OUT/chains.jsonl."""
    from mote.chains.importing import import_chains

    folder = folder_of(out, "the folder to create")
    imported = import_chains(file, folder, form, writer, limit)
    print(f"{folder / 'chains.jsonl'}: {imported.summary()}")


@click.command("export")
@_PATH
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option(
    "--license", "licence", default="unknown", help="Licence of the rows for the dataset card, by its id on the hub."
)
@click.option("--push", metavar="REPO", help="Also upload it to this dataset repository of the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Create that repository as private.")
def export(path: Path, out: Path, licence: str, push: str | None, private: bool) -> None:
    """Export the accepted chains of PATH as a dataset folder for datasets.load_dataset, with a card."""
    from mote.chains.publishing import export_dataset, push_dataset

    folder = folder_of(out, "the folder to create")
    export_dataset(path, folder, licence, push)
    print(folder)
    if push:
        print(push_dataset(folder, push, private))


for _command in (stats, view, import_, export):
    chains.add_command(_command)  # type: ignore[attr-defined]
