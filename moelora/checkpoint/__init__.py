"""Saving and loading a mixture, and knowing its base again."""
