"""How tests generate, and how near the logits of two ways of decoding are."""

from __future__ import annotations

import torch

# One length for all, so that rows can be compared; the pad token is never asked for.
NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}
# fp32 sums over another number of tokens at a time.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@torch.no_grad()
def guided_by_hand(model, ids, negative, inputs, scale=2.0):
    """What `guidance_scale` generates: both rows read as a whole at every step, with `inputs`."""
    expected = ids
    prompts = model.moelora.reads_prompts and "expert_weights" not in inputs
    for _ in range(NEW):
        new = expected[:, ids.shape[1] :]
        scores = []
        for prompt in (ids, negative):
            row = torch.cat([prompt, new], dim=1)
            mask = torch.arange(row.shape[1]).expand_as(row) < prompt.shape[1]
            own = {**inputs, "router_mask": mask} if prompts else inputs
            scores.append(model(row, **own).logits[:, -1].log_softmax(-1))
        guided = scale * (scores[0] - scores[1]) + scores[1]
        # It may end nowhere.
        guided[:, model.generation_config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, guided.argmax(-1, keepdim=True)], dim=1)
    return expected
