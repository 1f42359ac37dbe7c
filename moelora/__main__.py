"""`python -m moelora`, where the console script is not on the path."""

from moelora_cli import main

main()
