"""How tests generate, and how near the logits of two ways of decoding are."""

from __future__ import annotations

# One length for all, so that rows can be compared; the pad token is never asked for.
NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}
# fp32 sums over another number of tokens at a time.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
