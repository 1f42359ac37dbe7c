"""From hidden states to the experts that act: routers, their losses, forcing, reports."""
