"""What all commands share: the application, its output, and how an error ends it."""

from __future__ import annotations

import io
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from typer import Option
from typer.core import TyperGroup

# What users cause; other errors are more often a mistake of this package.
MISTAKES = (ValueError, TypeError, OSError, ImportError, SafetensorError, StrictDataclassError)

# Names and paths are shown as they are, whatever brackets and colons they have.
out, err = (
    Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)
    for stderr in (False, True)
)

OtherBase = Annotated[
    str | None, Option("--base", help="Where the base is, if not where the checkpoint says.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]


class Commands(TyperGroup):
    """Commands whose errors are a message on standard error and exit status 1, not a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; what a stream cannot encode is written as an escape."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of this context."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # What typer raises shows itself. A reader that has read enough closes the pipe: the
            # command ends quietly.
            by_typer = isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "show")
            if by_typer or isinstance(error, BrokenPipeError) or ctx.params["traceback"]:
                raise
            err.print(Text.assemble(("error: ", "bold red"), type(error).__name__))
            err.print(str(error))
            if not isinstance(error, MISTAKES):
                err.print("This may be a bug: `moelora --traceback …` shows where it happened.")
            raise typer.Exit(1) from error


app = typer.Typer(
    name="moelora",
    cls=Commands,
    help="Mixtures of LoRA experts: one model from the PEFT adapters that you have, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        out.print(f"moelora {__version__}")
        raise typer.Exit


Version = Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
Traceback = Option("--traceback", help="Show where an error happened.")


@app.callback()
def options(
    version: Annotated[bool, Version] = False, traceback: Annotated[bool, Traceback] = False
) -> None:
    """Take the options that stand before the command."""


def busy(what: str) -> AbstractContextManager[Any]:
    """A spinner while it lasts; on standard error, so that the output can be piped."""
    return err.status(Text(what))


def public_class(classifier: bool) -> Any:
    """The model class for a language model or a classifier."""
    from ..modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification

    return MoeLoraForSequenceClassification if classifier else MoeLoraForCausalLM


def read_checkpoint(folder: Path) -> tuple[Any, Any, Any]:
    """The tensors, the configuration and the base's fingerprint in a folder."""
    from ..checkpoint.load import read

    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}: it is not a moelora checkpoint.")
    return read(path)


def load(folder: Path, base: str | None) -> Any:
    """The saved mixture, of the class that its base has."""
    config = read_checkpoint(folder)[1]
    classifier = str(config.base_architecture or "").endswith("ForSequenceClassification")
    elsewhere = {} if base is None else {"base": base}
    return public_class(classifier).from_pretrained(str(folder), **elsewhere)
