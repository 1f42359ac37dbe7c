"""The console command `moelora`: check, compose, info, export, merge, route."""

from . import commands, route
from .console import app

__all__ = ["app", "commands", "main", "route"]


def main() -> None:
    """The entry point of the console script."""
    app()
