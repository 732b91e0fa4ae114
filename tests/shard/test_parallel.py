"""The rules for partitioning a model, and a model that runs on several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    Cohere2Config,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from loraplex_shard.device.parallel import GroupSizeError, partition_evenly, partition_heads, partition_units
from loraplex_shard.kernels.library import build, instruction_set
from tests.shard.decoders import load, save_checkpoint
from tests.shard.operations import kernels_directory
from tests.shard.rank_process import SIZES, run

pytestmark = pytest.mark.slow

# Nothing divides evenly: 9 heads in 3 groups, and odd numbers of MLP units and vocabulary entries.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 71,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
CHECKPOINTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-aligned": LlamaConfig(**SHAPE | {"intermediate_size": 400}),  # 144, 128 and 128 units over three ranks
    "qwen3": Qwen3Config(**SHAPE, head_dim=6, attention_bias=True),
    "olmo2": Olmo2Config(**SHAPE),  # norms over the heads of all ranks
    "phi3": Phi3Config(**SHAPE, pad_token_id=None),  # projections that are fused in the checkpoint
    "qwen2-moe": Qwen2MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=23, shared_expert_intermediate_size=37
    ),
    "gpt-oss": GptOssConfig(  # experts with biases, sinks, and interleaved gates and ups
        **SHAPE, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4, pad_token_id=None
    ),
    "cohere2": Cohere2Config(**SHAPE, sliding_window=4, pad_token_id=None, logit_scale=0.3),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_several_ranks_have_the_logits_of_one(
    name: str, size: int, ranks_logits: dict[str, torch.Tensor], ranks_directory: Path
) -> None:
    expected = run(load(ranks_directory / name))
    assert expected is not None
    torch.testing.assert_close(ranks_logits[f"{name} over {size}"], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ranks_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    for name, config in CHECKPOINTS.items():
        save_checkpoint(config, directory / name)
    return directory


@pytest.fixture(scope="module")
def ranks_logits(ranks_directory: Path) -> dict[str, torch.Tensor]:
    """The results of rank 0 in each group, by checkpoint and size."""
    build(kernels_directory(), instruction_set())  # compiles outside the ranks' time limit
    command = [sys.executable, "-m", "tests.shard.rank_process"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*command, str(rank), str(ranks_directory)], cwd=root, env=environment)
        for rank in range(max(SIZES))
    ]
    try:
        for rank in ranks:
            assert rank.wait(timeout=200) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return load_file(ranks_directory / "logits.safetensors")


def test_nine_heads_in_three_groups_over_two_ranks() -> None:
    cuts = [partition_heads(9, 3, rank, 2) for rank in range(2)]
    assert [(cut.query, cut.kv) for cut in cuts] == [(slice(0, 6), slice(0, 2)), (slice(6, 9), slice(2, 3))]


def test_nine_heads_in_three_groups_over_four_ranks() -> None:
    cuts = [partition_heads(9, 3, rank, 4) for rank in range(4)]
    assert [cut.query for cut in cuts] == [slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 9)]
    assert [cut.kv for cut in cuts] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(2, 3)]


@given(total=st.integers(1, 300), size=st.integers(1, 20))
def test_even_partitions_are_adjacent_complete_and_differ_by_at_most_one(total: int, size: int) -> None:
    if size > total:
        with pytest.raises(GroupSizeError, match=f"at most {total}"):
            partition_evenly(total, 0, size)
        return
    cuts = [partition_evenly(total, rank, size) for rank in range(size)]
    assert [index for cut in cuts for index in range(cut.start, cut.stop)] == list(range(total))
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), size=st.integers(1, 40))
def test_every_query_head_is_on_one_rank_together_with_its_kv_head(kv_heads: int, group: int, size: int) -> None:
    heads = kv_heads * group
    if -(-size // kv_heads) > group and size > kv_heads:
        with pytest.raises(GroupSizeError, match=f"at most {heads}"):
            partition_heads(heads, kv_heads, 0, size)
        return
    cuts = [partition_heads(heads, kv_heads, rank, size) for rank in range(size)]
    assert [head for cut in cuts for head in range(cut.query.start, cut.query.stop)] == list(range(heads))
    for cut in cuts:
        used = [head // group for head in range(cut.query.start, cut.query.stop)]
        assert sorted(set(used)) == list(range(cut.kv.start, cut.kv.stop))
        assert len({used.count(head) for head in used}) == 1, "each KV head of a rank has as many query heads"


@given(total=st.integers(1, 40_000) | st.integers(1, 700).map(lambda units: units * 64), size=st.integers(1, 8))
def test_mlp_units_are_partitioned_in_multiples_of_64_if_that_is_balanced(total: int, size: int) -> None:
    if size > total:
        return
    cuts = [partition_units(total, rank, size) for rank in range(size)]
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])] and cuts[-1].stop == total
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) - min(lengths) <= max(1, min(lengths) / 8)
    assert [partition_units(400, rank, 3) for rank in range(3)] == [slice(0, 144), slice(144, 272), slice(272, 400)]
    if total % 64 == 0 and total >= 512 * size:
        assert all(length % 64 == 0 for length in lengths)
