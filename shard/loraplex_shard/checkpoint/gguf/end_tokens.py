"""Finds the tokens of a GGUF file that end an answer: those that its metadata names, and those that llama.cpp
recognizes by their text, since most files name only one."""

from collections.abc import Mapping, Sequence

from loraplex_shard.checkpoint.gguf.file import MetadataValue

EOS = "tokenizer.ggml.eos_token_id"
NAMED = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep"))

# From llama.cpp's llama-vocab.cpp: special_eog_ids, and the texts of the tokens in NAMED.
TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "<end_of_utterance>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "[e~[",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)
# If all tokens of the set are present, the other token does not end an answer but is a part of it.
PARTS = (
    (frozenset({"<|return|>", "<|call|>"}), "<|end|>"),
    (frozenset({"<|return|>", "<|calls|>"}), "<|end|>"),
    (frozenset({"<|flush|>", "<|call|>"}), "<|end|>"),
    (frozenset({"<|flush|>", "<|calls|>"}), "<|end|>"),
    (frozenset({"<|tool_response>"}), "</s>"),
)


def end_token_ids(metadata: Mapping[str, MetadataValue], tokens: Sequence[str]) -> tuple[int, ...]:
    """The file's own end token (EOS), then the others in ascending order."""
    named = [metadata.get(key) for key in NAMED]
    ids = {token for token in named if isinstance(token, int) and 0 <= token < len(tokens)}
    ids |= {index for index, token in enumerate(tokens) if token in TEXTS}
    texts = {tokens[index] for index in ids}
    parts = {part for others, part in PARTS if others <= texts}
    ids = {index for index in ids if tokens[index] not in parts}
    eos = metadata.get(EOS)
    first = (eos,) if isinstance(eos, int) and 0 <= eos < len(tokens) else ()
    return (*first, *sorted(ids.difference(first)))
