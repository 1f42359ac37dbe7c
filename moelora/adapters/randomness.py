"""Random numbers that follow from a seed which the caller gives."""

from __future__ import annotations

import torch

from ..validation import check_integer


def seeded(seed: int | None) -> torch.Generator | None:
    """A generator on the CPU, which draws the same on every machine; None for no seed.

    Raises:
        ValueError, TypeError: the seed is not an integer from 0 to 2⁶³ - 1.
    """
    if seed is None:
        return None
    check_integer("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"seed={seed} is too large; expected an integer below 2**63.")
    return torch.Generator().manual_seed(seed)
