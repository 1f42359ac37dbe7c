"""Routers: from hidden states to the experts that act."""
