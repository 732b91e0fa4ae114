"""Builds a decoder from a checkpoint, tensor by tensor, so that no more than one tensor is ever held twice."""

from collections.abc import Callable, Iterable

from accelerate import init_empty_weights

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.layers.sources import Source, SourcedLayer, Target
from loraplex_shard.models.architectures import read_spec
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.rope import rope_tables
from loraplex_shard.ops.base import Operations
from loraplex_shard.parallel import Group

NAMES_IN_MESSAGE = 10


def load_decoder(
    checkpoint: Checkpoint,
    group: Group,
    ops: Operations,
    target: Target,
    max_model_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """This rank's part of the model, in the target's form and place, for positions below `max_model_len`.

    `progress` is told how many tensors are loaded, and of how many. Raises CheckpointError if the checkpoint is not
    that of a served model, naming the tensors that are missing, left over or of an unexpected shape; GroupSizeError
    if it cannot be cut into so many ranks.
    """
    spec = read_spec(checkpoint.architecture, checkpoint.config)
    cos, sin = rope_tables(checkpoint.config, spec.head_dim, max_model_len)
    with init_empty_weights(include_buffers=False):
        decoder = Decoder(spec, group, ops, (cos.to(target.device), sin.to(target.device)), target.dtype)
    layers = [module for module in decoder.modules() if isinstance(module, SourcedLayer)]
    if spec.tied:
        layers.remove(decoder.lm_head)
    sources = [source for layer in layers for source in layer.all_sources]
    _check(checkpoint, sources, spec.tied)
    loaded = 0
    for layer in layers:
        for _ in layer.load(checkpoint, target):
            loaded += 1
            if progress is not None:
                progress(loaded, len(sources))
    if spec.tied:
        decoder.lm_head.tie(decoder.embedding.weight)
    return decoder.eval()


def _check(checkpoint: Checkpoint, sources: Iterable[Source], tied: bool) -> None:
    shapes = {source.tensor: source.shape for source in sources}
    missing = shapes.keys() - checkpoint.names
    if missing:
        raise CheckpointError(f"{checkpoint.model_id}: missing {_listed(missing)}")
    extra = {name for name in checkpoint.names - shapes.keys() if not _is_redundant(checkpoint, name, tied)}
    if extra:
        raise CheckpointError(f"{checkpoint.model_id}: {checkpoint.architecture} has no {_listed(extra)}")
    for name, shape in shapes.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.model_id}: tensor {name} has shape {list(checkpoint.shape(name))}, "
                f"but the configuration asks for {list(shape)}"
            )


def _is_redundant(checkpoint: Checkpoint, name: str, tied: bool) -> bool:
    """Old checkpoints hold RoPE's constants, some a copy of the embedding as their tied lm head; GPTQ's tools give
    every layer a bias, of zeros if the model has none."""
    if name.endswith(".bias"):
        return not checkpoint.read(name).any()
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _listed(names: Iterable[str]) -> str:
    """The first few names, in order."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_IN_MESSAGE
    return "tensor " + ", ".join(ordered[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
