"""Random samples of grammars, with one token per byte."""

from random import Random

import torch

from loraplex_protos.shard_pb2 import Grammar, SequenceStart
from loraplex_shard.sampling.constraints import Constraints
from loraplex_shard.sampling.grammars import GrammarCompiler
from tests.e2e.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
TOKENIZER_JSON = TOKENIZER.backend_tokenizer.to_str().encode()
END = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER)


def create_compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER_JSON, VOCAB, (END,))


def constrained(compiler: GrammarCompiler, grammar: Grammar, **more: object) -> Constraints:
    constraints = Constraints(compiler, VOCAB)
    constraints.start(SequenceStart(row=0, tokens=[0], prompt_length=1, grammar=grammar, **more))
    return constraints


def sample(constraints: Constraints, random: Random, most: int = 2000) -> str | None:
    """The output of row 0 if all allowed tokens are equally likely; None if it does not end."""
    tokens: list[int] = []
    while len(tokens) < most:
        masks = constraints.begin([0], [1 + len(tokens)])
        assert masks is not None
        (allowed,) = masks.apply(torch.zeros(1, VOCAB)).isfinite().tolist()
        token = random.choice([token for token in range(VOCAB) if allowed[token]])
        constraints.accept([0], [token])
        assert not constraints.failed([0]).any()
        if token == END:
            return bytes(TOKENIZER.decode(tokens), "utf-8").decode()
        tokens.append(token)
    return None
