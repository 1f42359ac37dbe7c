"""What runs when the model runs: one forward pass, its routing, its losses."""
