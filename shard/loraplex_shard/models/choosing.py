"""Chooses whose modeling code runs a checkpoint's model. transformers' modeling code is imported only for a model that
needs it, since the import takes seconds."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.architectures import is_known, is_text_served_alone, read_spec
from loraplex_shard.models.base import Model
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.models.text_part import TextModel
from loraplex_shard.ops.base import Operations

logger = logging.getLogger(__name__)


def check_architecture(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the model's configuration or class shows that it cannot be served."""
    if (refusal := _refusal(checkpoint)) is not None:
        from loraplex_shard.models.transformers.checking import check_class

        with _both_named(refusal):
            check_class(_alone(checkpoint))


def load_model(
    checkpoint: Checkpoint,
    group: Group,
    ops: Operations,
    form: ParameterForm,
    max_model_len: int,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads this rank's part of the model, in this form, for positions below `max_model_len`.

    `progress` is called with the number of loaded tensors and the number of all tensors. Raises CheckpointError if the
    model is not served, or if tensors are missing, left over or have an unexpected shape, naming them; GroupSizeError
    if it cannot be cut for this number of ranks.
    """
    if (refusal := _refusal(checkpoint)) is None:
        return load_decoder(checkpoint, group, ops, form, max_model_len, progress)
    from loraplex_shard.models.transformers.loading import load_transformers

    logger.info("%s%s runs with transformers' modeling code", checkpoint.architecture, refusal and f" ({refusal})")
    with _both_named(refusal):
        return load_transformers(_alone(checkpoint), group, ops, form, max_model_len, progress)


def _refusal(checkpoint: Checkpoint) -> str | None:
    """Why our own decoder does not compute this variant of a known architecture. Empty if the architecture is unknown;
    None if the decoder computes it."""
    if not is_known(checkpoint.architecture):
        return ""
    try:
        read_spec(checkpoint.architecture, checkpoint.config)
    except CheckpointError as error:
        return error.message
    return None


def _alone(checkpoint: Checkpoint) -> Checkpoint | TextModel:
    return TextModel(checkpoint) if is_text_served_alone(checkpoint.architecture) else checkpoint


@contextmanager
def _both_named(refusal: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{refusal}; {error.message}" if refusal else error.message) from error
