"""How commands speak: one sentence for what a user can act on, a traceback for everything else."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from posttrain.errors import UserError


def prepare() -> None:
    """What every command of ours does first, and no import of this package does."""
    # A recipe may name a function of the working directory; last, so that nothing there hides a package.
    sys.path.append(os.getcwd())
    # vLLM, which TRL imports, remarks on every machine without a GPU that Triton is of no use there.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.formatwarning = _format_warning


_format_any_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours is a sentence; a library's keeps its place."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return _format_any_warning(message, category, filename, lineno, line)


@contextmanager
def reported(interrupted: str = "interrupted") -> Iterator[None]:
    """Print a `UserError` as `error: …` and exit with 2; exit with 130 on Ctrl-C, saying `interrupted`."""
    try:
        yield
    except UserError as error:
        if not error.told:
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\n{interrupted}", err=True)
        raise typer.Exit(130) from None


def warn(sentence: str) -> None:
    """Print `warning: …` on standard error."""
    typer.echo(f"{typer.style('warning:', fg='yellow', bold=True)} {sentence}", err=True)


class Group(TyperGroup):
    """A group whose commands report user errors in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with reported():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command that stands alone and reports user errors in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with reported():
            return super().invoke(ctx)


def print_yaml(text: str) -> None:
    """Write YAML: highlighted on a terminal, as it is anywhere else."""
    if not sys.stdout.isatty():
        typer.echo(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text.rstrip("\n"), "yaml", theme="ansi_dark", word_wrap=True))
