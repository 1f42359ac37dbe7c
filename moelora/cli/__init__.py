"""The console command `moelora`: check, compose, info, export, merge, route."""

from . import adapters, checkpoint, route
from .console import app

__all__ = ["adapters", "app", "checkpoint", "main", "route"]


def main() -> None:
    """The entry point of the console script."""
    app()
