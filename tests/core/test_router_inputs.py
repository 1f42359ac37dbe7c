"""What routers read beside a token's hidden state reaches them in threads, under offload, in
half-precision bases, and through the collators of a data set.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from bases import causal_base
from core.mixtures import ROUTERS_AT_LEVELS, causal, into, tokens, told
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from moelora import PadRouting

SPECIAL = [(r, level) for r, level in ROUTERS_AT_LEVELS if r in ("hashed", "context", "hybrid")]
special = pytest.mark.parametrize("router,level", SPECIAL)
THREADS = 4


@special
@torch.no_grad()
def test_threads_do_not_mix_what_their_routers_read(router, level):
    torch.set_num_threads(1)
    model = causal(router=router, routing_level=level)
    inputs = [tokens(1 + i % 3, 4 + i, seed=i) for i in range(THREADS)]
    given = [told(model, ids, seed=i) for i, ids in enumerate(inputs)]
    settings = {"max_new_tokens": 3, "do_sample": False}

    @torch.no_grad()
    def work(number, meet=None):
        if meet is not None:
            meet.wait()
        own = given[number]
        return model(inputs[number], **own).logits, model.generate(
            inputs[number], **own, **settings
        )

    expected = [work(number) for number in range(THREADS)]
    meet = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for own, found in zip(expected, pool.map(lambda i: work(i, meet), range(THREADS))):
            assert all(torch.equal(a, b) for a, b in zip(own, found, strict=True))


@special
@torch.no_grad()
def test_an_offloaded_mixture_computes_the_same(router, level):
    model = causal(router=router, routing_level=level)
    ids = tokens()
    more = told(model, ids)
    logits = model(ids, **more).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.moelora.has_values and next(model.model.layers[0].parameters()).is_meta
    assert torch.equal(model(ids, **more).logits, logits)
    found = model.generate(ids, max_new_tokens=3, do_sample=False, **more)
    assert found.shape == (2, 13)


@special
@torch.no_grad()
def test_a_half_precision_base_and_context_are_routed_in_fp32(router, level):
    model = into(causal_base().to(torch.bfloat16), router=router, routing_level=level)
    more = {name: value.bfloat16() for name, value in told(model, tokens()).items()}
    outputs = model(tokens(), output_expert_routing=True, **more)
    assert outputs.logits.dtype == torch.bfloat16
    for routing in outputs.expert_routing:
        assert routing.logits.dtype == routing.expert_weights.dtype == torch.float32


def _tokenizer():
    vocabulary = {"[UNK]": 0, "[PAD]": 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


COLLATORS = {
    "default": lambda: default_data_collator,
    "padding": lambda: DataCollatorWithPadding(_tokenizer()),
    "seq2seq": lambda: DataCollatorForSeq2Seq(_tokenizer()),
    "language modelling": lambda: DataCollatorForLanguageModeling(_tokenizer(), mlm=False),
    "PadRouting": lambda: PadRouting(),
    "PadRouting around another": lambda: PadRouting(DataCollatorForSeq2Seq(_tokenizer())),
}


@pytest.mark.parametrize("as_lists", [True, False])
@pytest.mark.parametrize("name", COLLATORS)
def test_collators_hand_a_context_on(name, as_lists):
    context = torch.randn(2, 5)
    lengths = (4, 4) if name == "default" else (4, 6)
    rows = []
    for length, own in zip(lengths, context):
        ids = torch.arange(3, 3 + length)
        row = {"input_ids": ids, "router_context": own}
        if name not in ("language modelling", "padding"):
            row["labels"] = ids
        rows.append({k: v.tolist() if as_lists else v for k, v in row.items()})
    batch = COLLATORS[name]()(rows)
    torch.testing.assert_close(batch["router_context"], context)
    model = causal(router="context", router_options={"context_size": 5})
    assert model(**batch).logits.shape[:2] == (2, max(lengths))
