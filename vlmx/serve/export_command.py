"""Options of `vlmx export`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click
from click.shell_completion import CompletionItem

from vlmx.console import note
from vlmx.runs import RunFolder, list_runs

EPILOG = """\b
Worked examples:
  vlmx export latest -o my-vlm
      one transformers LLaVA if the encoder is a CLIP ViT, else connector, LLM, and a README with code
  vlmx export runs/vmamba-mlp2 -o my-vlm --step best --dtype bfloat16
      the best checkpoint that was kept, in half the space
"""


def _complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [*list_runs(Path("runs")), "latest"]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command("export", epilog=EPILOG)
@click.argument("run_name", metavar="RUN", shell_complete=_complete_run)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="A new folder.")
@click.option("--step", metavar="N|best", help="A checkpoint. Default: the model at the end of the training.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "llava", "parts"]),
    default="auto",
    show_default=True,
    help="llava: one transformers model; parts: connector and LLM; auto: llava if that is possible.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights.",
)
@click.option("--weights", metavar="FILE", help="The encoder's checkpoint, for llava. Default: looked up.")
def export(run_name: str, out: Path, step: str | None, layout: str, dtype: str, weights: str | None) -> None:
    """Write a trained model for use without vlmx."""
    import torch

    from vlmx.serve.export import Layout, export_run

    chosen: Layout = next(known for known in get_args(Layout) if known == layout)
    written = export_run(
        RunFolder.open(run_name), out, step=step, layout=chosen, dtype=getattr(torch, dtype), weights=weights
    )
    note(f"{'a transformers LLaVA' if written == 'llava' else 'connector and LLM in their parts'}; see {out}/README.md")
    click.echo(str(out))
