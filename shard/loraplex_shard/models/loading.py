"""Builds a decoder from a checkpoint, tensor by tensor, so that at most one tensor is in memory twice."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from accelerate import init_empty_weights

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import LoadableLayer, ParameterForm, TensorSlice
from loraplex_shard.models.architectures import read_spec
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.rope import rotary
from loraplex_shard.models.served import ServedWeights
from loraplex_shard.models.tensor_checks import differ, listed
from loraplex_shard.models.text_part import TextPart
from loraplex_shard.ops.base import Operations

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"

Tensors = Checkpoint | TextPart


def load_decoder(
    checkpoint: Checkpoint,
    group: Group,
    ops: Operations,
    form: ParameterForm,
    max_model_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Does what choosing.load_model says, for a known architecture."""
    spec, config = (
        read_spec(checkpoint.architecture, checkpoint.config),
        checkpoint.config.get_text_config(decoder=True),
    )
    tensors = checkpoint if config is checkpoint.config else TextPart(checkpoint, spec.names.backbone)
    embedding = f"{spec.names.embedding}.weight"
    if spec.tied and {embedding, HEAD} <= tensors.names and differ(tensors, embedding, HEAD, form.dtype):
        logger.warning(
            "%s: config.json says tie_word_embeddings, but %s differs from %s: both are served as they are",
            *(checkpoint.model_id, HEAD, embedding),
        )
        spec = replace(spec, tied=False)
    if checkpoint.classifies:
        spec = replace(spec, has_head=False, tied=False)
    if checkpoint.is_backbone and not spec.tied and HEAD not in tensors.names:
        spec = replace(spec, has_head=False)
    if spec.tied and embedding not in tensors.names:
        embedding = HEAD  # a checkpoint may hold either of two tied tensors
    tables = {each: rotary(config, each, max_model_len).to(form.device) for each in set(spec.rotary) if each}
    with init_empty_weights(include_buffers=False):
        decoder = Decoder(spec, group, ops, tables, form.device, form.dtype, embedding)
    layers = [module for module in decoder.modules() if isinstance(module, LoadableLayer)]
    served = ServedWeights(layers, tensors, form, embedding if spec.tied else None, decoder.vocabulary)
    decoder.served = decoder.matrices = served
    if spec.tied:
        decoder.lm_head.matrix = ()  # if it has a bias, that is not tied
    for layer in layers:
        layer.choose_slices(tensors)
    slices = [tensor_slice for layer in layers for tensor_slice in layer.all_slices]
    _check(checkpoint, tensors, slices, spec.tied or not spec.has_head)
    loaded = 0
    for layer in layers:
        for _ in layer.load(tensors, form):
            loaded += 1
            if progress is not None:
                progress(loaded, len(slices))
    if spec.tied:
        decoder.lm_head.tie(decoder.embedding.weight)
    decoder.tensors = tensors
    return decoder.eval()


def _check(checkpoint: Checkpoint, tensors: Tensors, slices: Iterable[TensorSlice], spare_head: bool) -> None:
    """Checks the decoder's tensors: there must be all of them, with their shapes, and no others. `spare_head`: a tensor
    of the lm head is not used, and is ignored."""
    shapes = {tensor_slice.tensor: tensor_slice.shape for tensor_slice in slices}
    missing = shapes.keys() - tensors.names
    if missing:
        hint = "" if missing != {HEAD} else ": if it is the embedding, set tie_word_embeddings in config.json to true"
        raise CheckpointError(f"{checkpoint.model_id}: missing {listed(missing)}{hint}")
    extra = {name for name in tensors.names - shapes.keys() if not _is_redundant(tensors, name, spare_head)}
    if extra:
        raise CheckpointError(f"{checkpoint.model_id}: {checkpoint.architecture} has no {listed(extra)}")
    for name, shape in shapes.items():
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.model_id}: tensor {name} has shape {list(tensors.shape(name))}, "
                f"but the configuration asks for {list(shape)}"
            )


def _is_redundant(tensors: Tensors, name: str, spare_head: bool) -> bool:
    """Whether a tensor can be ignored. Old checkpoints have RoPE's constants and causal masks. Some have a copy of the
    embedding as their tied lm head, or an lm head in addition to their classifier. GPTQ's tools give every layer a
    bias, which is zeros if the model has none."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return True
    if name.endswith(".bias"):
        return not tensors.read(name).any()
    return name.endswith(".rotary_emb.inv_freq") or (spare_head and name == HEAD)
