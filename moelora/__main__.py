"""`python -m moelora`, where the console script is not on the path."""

from .cli import main

main()
