"""What is done with chains that are there: count, read, bring in from elsewhere, pass on."""

from pathlib import Path

import click

from mote.chains.diversity import TOKENIZERS
from mote.cli.stages import chains

_PATH = click.argument("path", type=click.Path(path_type=Path))


@click.command()
@_PATH
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Also draw shares, outcomes, lengths and tokens to this SVG file."
)
@click.option("--price", type=click.FloatRange(min=0), nargs=2, metavar="READ WRITTEN",
              help="US dollars a million tokens read and a million written, to count money.")  # fmt: skip
@click.option("--sample", type=click.IntRange(min=2), default=200, help="Texts that Self-BLEU is taken of at most.")
@click.option("--tokenizer", type=click.Choice(TOKENIZERS), default="13a", help="Of Self-BLEU, by sacrebleu's name.")
def stats(
    path: Path, as_json: bool, plot: Path | None, price: tuple[float, float] | None, sample: int, tokenizer: str
) -> None:
    """Count the chains of PATH, a chains.jsonl or the run folder of one, beside the paper's numbers."""
    from mote.chains.costs import Price
    from mote.chains.stats import chain_stats, table
    from mote.report.chains_page import plots_of

    of_tokens = Price(read=price[0], written=price[1]) if price is not None else None
    found = chain_stats(path, of_tokens, sample, tokenizer)
    if plot is not None:
        from mote.core.files import write_atomic
        from mote.report.plots import standalone

        write_atomic(plot, standalone(plots_of(found)))
    print(found.model_dump_json(indent=2) if as_json else table(found))


@click.command()
@_PATH
@click.option("--out", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
def view(path: Path, out: Path) -> None:
    """Write the chains of PATH as one page to read and filter, which loads nothing from anywhere."""
    from mote.report.chains_page import write_page

    write_page(path, out)
    print(out)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["auto", "star1", "messages", "hh-rlhf"]), default="auto",
              help="Layout of the file; auto tells it from the columns.")  # fmt: skip
@click.option("--writer", help="Who wrote the chains, where the format does not say.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N rows.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
def bring(file: Path, form: str, writer: str | None, limit: int | None, out: Path) -> None:
    """Make chains of other people's answers in FILE -> OUT/chains.jsonl."""
    from mote.chains.importing import import_chains

    made = import_chains(file, out, form, writer, limit)
    print(f"{out / 'chains.jsonl'}: {made.summary()}")


@click.command("export")
@_PATH
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--license", "licence", default="unknown", help="Licence of the rows, as the hub names it, for the card.")
@click.option("--push", metavar="REPO", help="Also upload it to this dataset repository of the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make that repository private, where it is new.")
def pass_on(path: Path, out: Path, licence: str, push: str | None, private: bool) -> None:
    """Write the accepted chains of PATH as a folder for datasets.load_dataset, with a card."""
    from mote.chains.publishing import export_dataset, push_dataset

    export_dataset(path, out, licence, push)
    print(out)
    if push:
        print(push_dataset(out, push, private))


for _command in (stats, view, bring, pass_on):
    chains.add_command(_command)  # type: ignore[attr-defined]
