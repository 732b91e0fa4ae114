"""Tests of operations on a GPU see what was written and returned there, as they do on the CPU."""

import pytest
import torch

from loraplex_shard.ops.base import HeadNorms
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.heads import Heads
from tests.shard.elsewhere import Elsewhere
from tests.shard.operations import angles, cached, filled_cache, paged_batch, random
from tests.shard.test_ops_cuda import lora_layer

HEADS = Heads(query=2, kv=1, dim=16)


@pytest.mark.parametrize("ops", [ReferenceOperations(), Elsewhere(ReferenceOperations(), torch.clone)])
def test_what_a_call_wrote_and_returned_is_copied_back(ops: ReferenceOperations) -> None:
    batch, num_blocks = paged_batch([(5, 1), (14, 3)], seed=0)
    (layer,) = filled_cache(num_blocks, HEADS, torch.float32, 0).layers
    qkv, before = random(0, 4, HEADS.width), [tensor.clone() for tensor in cached(layer)]
    step = ops.prepare(batch)
    ops.rotate_and_write(qkv, HEADS, HeadNorms(random(1, 3, 16), 1e-6), angles(20, 16), step, layer)
    assert not any(old.equal(new) for old, new in zip(before, cached(layer), strict=True))
    assert not qkv.equal(random(0, 4, HEADS.width))
    out = ops.attention(qkv, HEADS, step, layer)
    assert out.shape == (4, 32) and out.isfinite().all()
    adapter, layout = lora_layer(0, 3)
    delta = torch.zeros(4, 64)
    ops.add_lora_delta(delta, random(2, 4, 1100), (Segment(1, 3, adapter),), layout)
    assert delta.any(1).tolist() == [False, True, True, False]
    assert ops.add_(delta, delta, 1.0) is None
