"""Putting a mixture into a base and taking it out again."""
