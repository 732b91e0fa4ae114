"""What an adapter's tensors do to the embedding and the lm head: LoRA, matrices trained whole or for more tokens than
the model has (modules_to_save, save_embedding_layers), and tokens trained by themselves (trainable_token_indices).

PEFT wraps each of the two modules in one way at most, and loads a tensor into whatever has its name. Where the lm head
is the embedding, both hold one matrix until a wrapper copies it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.outputs import Replaced, name_of_bias, name_of_magnitude, nothing, with_outputs
from loraplex_shard.lora.peft.shapes import check_shape, listed
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.peft.tying import Tying
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import Delta, OwnRows, name_of_a, name_of_b
from loraplex_shard.shapes.layout import VocabularyLayout

Wrapper = Literal["none", "saved", "targeted", "tokens"]
# What PEFT calls the matrix that the base came with, below the module.
_BASE: dict[Wrapper, str] = {
    "none": "weight",
    "saved": "original_module.weight",
    "targeted": "base_layer.weight",
    "tokens": "token_adapter.base_layer.weight",
}
_SAVED = re.compile(r"modules_to_save(\.[^.]+)?\.weight")
_TOKENS = "token_adapter.trainable_tokens_delta"
FEW = 4  # where the head has LoRA too: up to one in so many rows are computed by themselves, more of them as a matrix
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True)
class Half:
    """The embedding or the lm head, as PEFT wraps it."""

    module: str
    wrapper: Wrapper
    target: Target | None = None
    tokens: tuple[int, ...] = ()

    def name(self, suffix: str) -> str:
        return f"{PREFIX}{self.module}.{suffix}"

    @property
    def base_name(self) -> str:
        """What a file calls the matrix that the base came with."""
        return self.name(_BASE[self.wrapper])

    @property
    def weight(self) -> str:
        """What a file calls its matrix."""
        return self.name("weight") if self.wrapper == "saved" else self.base_name


def read_vocabulary(
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, Target],
    tokens: Mapping[str, Sequence[int]],
    tying: Tying,
    base: BaseModel,
    has_head: bool = True,
) -> dict[str, Delta]:
    """The deltas of the two modules, as far as there are any, by module. `tensors` are theirs, by PEFT's names;
    `tokens` as token_indices has them; `has_head`: whether the model has an lm head.

    Raises AdapterInvalidError, naming the tensor, for what is missing, too much, or of another shape than it must be.
    """
    reading = _Reading(tensors, targets, tokens, tying, base, has_head)
    found = {base.embedding: reading.embedding(), base.head: reading.head() if has_head else None}
    reading.refuse_the_rest()
    return {module: delta for module, delta in found.items() if delta is not None}


class _Reading:
    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        targets: Mapping[str, Target],
        tokens: Mapping[str, Sequence[int]],
        tying: Tying,
        base: BaseModel,
        has_head: bool,
    ) -> None:
        assert base.served is not None
        self._tensors, self._unused, self._base, self._served = tensors, set(tensors), base, base.served
        self._tying, self._config = tying, tying.config
        self._layout: VocabularyLayout = base.served.vocabulary
        saved = {module for module in (base.embedding, base.head) if self._is_saved(module)}
        # PEFT puts the embedding's tokens below LoRA of the head that is tied to it.
        shared = {base.head} if base.served.tied and tokens.get(base.head) == tokens.get(base.embedding) else set()
        if clash := tokens.keys() & (saved | (targets.keys() - shared)):
            raise AdapterInvalidError(
                f"adapter_config.json: trainable_token_indices: {listed(clash)} is adapted as a whole, too: PEFT"
                " computes one or the other"
            )
        self._embedding, self._head = (
            Half(module, _wrapper(module, saved, targets, tokens), targets.get(module), tuple(tokens.get(module, ())))
            for module in (base.embedding, base.head)
        )
        self._matrices = self._read_matrices()
        self._count = self._count_tokens(has_head)

    def embedding(self) -> Delta | None:
        half, count, layout = self._embedding, self._count, self._layout
        delta, factors = nothing(layout.hidden_size, count), None
        if half.target is not None:
            name_a, name_b, lora_rank = (
                half.name("lora_embedding_A"),
                half.name("lora_embedding_B"),
                half.target.lora_rank,
            )
            a, b = self._take(name_a), self._take(name_b)
            self._check(name_a, a, lora_rank=lora_rank, tokens=count)
            self._check(name_b, b, hidden_size=layout.hidden_size, lora_rank=lora_rank)
            if self._tying.targets:  # PEFT loads the head's after them, into the same memory
                b, a = (matrix.T for matrix in self._head_matrices())
            delta = Delta(a, b, half.target.scale)
        own = self._own_rows(half)
        if half.target is not None and self._config.use_dora:
            magnitude = self._take(name_of_magnitude(half.module))
            self._check(name_of_magnitude(half.module), magnitude, hidden_size=layout.hidden_size)
            factors = magnitude.float() / self._column_lengths(delta, own)
            delta = replace(delta, b=delta.b.float() * factors[:, None], gain=factors)
        if own is not None:
            rows = own.rows.float() if half.target is not None else own.rows
            rows = rows if factors is None else rows * factors
            if half.target is not None:
                rows = torch.addmm(rows, delta.a[:, own.ids].float().T, delta.b.float().T, alpha=delta.scale)
            delta = replace(delta, own=replace(own, rows=rows))
            if len(own.ids) == count:  # there are no others
                delta = replace(nothing(layout.hidden_size, count), own=delta.own)
        return None if delta.own is None and half.target is None else delta

    def head(self) -> Delta | None:
        half, count, layout = self._head, self._count, self._layout
        delta, outputs = nothing(count, layout.hidden_size), dict[str, torch.Tensor]()
        if half.target is not None:
            module, lora_rank = half.module, half.target.lora_rank
            a, b = self._head_matrices()
            self._check(name_of_a(module), a, lora_rank=lora_rank, hidden_size=layout.hidden_size)
            self._check(name_of_b(module), b, tokens=count, lora_rank=lora_rank)
            delta = Delta(a, b, half.target.scale)
            wanted = [name_of_magnitude] * bool(self._config.use_dora) + [name_of_bias] * bool(self._config.lora_bias)
            for name in (name_of(module) for name_of in wanted):
                outputs[name] = self._take(name)
                self._check(name, outputs[name], tokens=count)
        own, bias = self._own_rows(half), self._head_bias()
        if half.tokens and (old := self._base.bias(half.module)) is not None:
            bias = torch.zeros_like(old)  # with trained tokens, PEFT computes a head without its bias
        if own is None and half.target is None and bias is None:
            return None
        size, matrix = layout.vocab_size, None
        plain = replace(delta, b=_resized(delta.b, size))
        known = {name: _resized(tensor, size) for name, tensor in outputs.items()}
        if own is not None:
            rows = self._folded(own, delta, outputs)
            trained = self._matrices[half.module]
            if half.target is not None and trained is not None and (own.ids < size).sum() > size // FEW:
                matrix = _resized(trained, size)
                beyond = own.ids >= size
                own, rows = replace(own, ids=own.ids[beyond]), rows[beyond]
            biases = self._base.bias(half.module) if bias is None else bias
            own = replace(own, rows=rows, biases=None if biases is None else _resized(biases, count)[own.ids])
        replaced = Replaced(matrix, None if bias is None else _resized(bias, size))
        return replace(with_outputs(half.module, plain, known, replaced, self._base), own=own)

    def _head_bias(self) -> torch.Tensor | None:
        """What takes the place of the head's bias, where it has one."""
        half, old = self._head, self._base.bias(self._head.module)
        if old is None:
            return None
        came = self._find(half.name(_BASE[half.wrapper].removesuffix("weight") + "bias"))
        bias = self._take(half.name("bias")) if half.wrapper == "saved" else came
        if bias is not None:
            self._check(half.name("bias"), bias, tokens=self._count)
        if bias is None or bias.is_meta or (bias.shape == old.shape and bias.equal(old.to(bias.dtype))):
            return None
        return bias

    def refuse_the_rest(self) -> None:
        """Tensors that PEFT has no place for. Those that the base has, too, are no harm."""
        extra = set[str]()
        for name in self._unused:
            module = next(half.module for half in (self._embedding, self._head) if name.startswith(half.name("")))
            if not name.endswith(".weight") or ".lora_" in name:
                extra.add(name)
            elif not self._base.holds(f"{module}.weight", self._tensors[name]):
                raise AdapterInvalidError(
                    f"{TENSORS}: {listed({name})}: these differ from the model's own weights, but adapter_config.json"
                    " does not call for them: the adapter was made for another base"
                )
        if extra:
            raise AdapterInvalidError(f"{TENSORS}: adapter_config.json does not call for {listed(extra)}")

    def _read_matrices(self) -> dict[str, torch.Tensor | None]:
        """What each half holds in place of the base's matrix."""
        halves = self._embedding, self._head
        came = {half.module: self._find(half.base_name) for half in halves}
        if self._served.tied:  # the head's is loaded last
            last = came[self._head.module]
            came = dict.fromkeys(came, came[self._embedding.module] if last is None else last)
        found = {
            half.module: self._read_saved(half) if half.wrapper == "saved" else came[half.module] for half in halves
        }
        if self._tying.saved:
            found[self._embedding.module] = found[self._head.module]
        for half in halves:
            if (matrix := found[half.module]) is not None:
                rows = len(matrix) if matrix.dim() else 0
                self._check(half.weight, matrix, tokens=rows, hidden_size=self._layout.hidden_size)
        return found

    def _read_saved(self, half: Half) -> torch.Tensor:
        """A module's copy. Where PEFT saves all of an embedding, too, the file has it twice."""
        again = [name for name in self._tensors if _SAVED.fullmatch(name.removeprefix(half.name("")))]
        found = [tensor for name in again if (tensor := self._find(name)) is not None]
        own = self._find(half.name("weight"))
        return own if own is not None else found[0] if found else self._take(half.name("weight"))

    def _count_tokens(self, has_head: bool) -> int:
        """Of both. Of two modules with fewer tokens than the model, PEFT leaves out the one that is not targeted."""
        halves = (self._embedding, self._head) if has_head else (self._embedding,)
        counts = {half: len(matrix) for half in halves if (matrix := self._matrices[half.module]) is not None}
        if not counts:
            return self._layout.vocab_size
        given, count = max(counts.items(), key=lambda item: item[1])
        cut = count < self._layout.vocab_size and given.wrapper == "targeted"
        for half in halves:
            if counts.get(half, count if cut else self._layout.vocab_size) != count:
                has = f"has {counts[half]}" if half in counts else "is not in the file"
                raise AdapterInvalidError(
                    f"{TENSORS}: {given.weight} has {count} tokens, but {half.weight} {has}: save the embedding and the"
                    " lm head as they were in training (PEFT: save_pretrained(..., save_embedding_layers=True))"
                )
        if count != self._layout.vocab_size and not self._served.resizable:
            raise AdapterInvalidError(
                f"{TENSORS}: {given.weight} has {count} tokens, and the model {self._layout.vocab_size}: adapters with"
                " more or fewer tokens are not served where transformers' code computes the model"
            )
        return count

    def _own_rows(self, half: Half) -> OwnRows | None:
        """Of the half's matrix, and of the tokens that are trained by themselves, before LoRA."""
        matrix, count = self._matrices[half.module], self._count
        ids, rows = torch.zeros(0, dtype=torch.int64), torch.zeros(0, self._layout.hidden_size)
        if matrix is not None:
            ids = self._base.differing_rows(f"{half.module}.weight", matrix, exactly=half.wrapper == "saved")
            rows = matrix if len(ids) == len(matrix) else matrix[ids]
        if half.tokens:
            trained = self._trained_tokens(half, count)
            kept = ~torch.isin(ids, trained.ids)
            ids, rows = torch.cat((ids[kept], trained.ids)), torch.cat((rows[kept].to(trained.rows), trained.rows))
            order = ids.argsort()
            ids, rows = ids[order], rows[order]
        return OwnRows(count, ids, rows) if len(ids) or count != self._layout.vocab_size else None

    def _trained_tokens(self, half: Half, count: int) -> OwnRows:
        shared = self._served.tied and half is self._head and half.tokens == self._embedding.tokens
        name = (self._embedding if shared else half).name(_TOKENS)
        self._unused.discard(half.name(_TOKENS))  # PEFT saves them again with all of a head, and does not read them
        delta = self._take(name)
        self._check(name, delta, indices=len(half.tokens), hidden_size=self._layout.hidden_size)
        if max(half.tokens, default=0) >= count:
            raise AdapterInvalidError(
                f"adapter_config.json: trainable_token_indices: {max(half.tokens)} is not a token: {half.module} has"
                f" {count}; resize it before training, and save it with the adapter"
            )
        places = {token: place for place, token in enumerate(half.tokens)}  # of several, the last counts
        ids = torch.tensor(sorted(places), dtype=torch.int64)
        return OwnRows(count, ids, delta[[places[int(token)] for token in ids]])

    def _head_matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its A and B; where they are the embedding's, a file may have them once."""
        a, b = name_of_a(self._head.module), name_of_b(self._head.module)
        if not self._tying.targets:
            return self._take(a), self._take(b)
        own_a, own_b = self._find(a), self._find(b)
        theirs = (
            self._take(self._embedding.name("lora_embedding_B")),
            self._take(self._embedding.name("lora_embedding_A")),
        )
        return theirs[0].T if own_a is None else own_a, theirs[1].T if own_b is None else own_b

    def _folded(self, own: OwnRows, delta: Delta, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The head's own rows with what LoRA does to them."""
        if self._head.target is None:
            return own.rows
        rows = torch.addmm(own.rows.float(), delta.b[own.ids].float(), delta.a.float(), alpha=delta.scale)
        magnitude = outputs.get(name_of_magnitude(self._head.module))
        if name_of_bias(self._head.module) in outputs:
            raise AdapterInvalidError(
                f"{TENSORS}: {name_of_bias(self._head.module)}: not served beside an lm head of its own"
            )
        return rows if magnitude is None else rows * (magnitude[own.ids].float() / rows.norm(dim=1))[:, None]

    def _column_lengths(self, delta: Delta, own: OwnRows | None) -> torch.Tensor:
        """Of what the embedding's matrix and the delta add up to, over all tokens: [hidden]."""
        if delta.a.is_meta:
            return delta.a.new_ones(self._layout.hidden_size)
        squares = torch.zeros(self._layout.hidden_size)
        count = self._count
        for start in range(0, count, ROWS_AT_A_TIME):
            part = slice(start, min(start + ROWS_AT_A_TIME, count))
            rows = torch.zeros(part.stop - part.start, self._layout.hidden_size)
            known = slice(part.start, min(part.stop, self._layout.vocab_size))
            if known.start < known.stop:
                rows[: known.stop - known.start] = self._served.read(self._embedding.module, known)
            if own is not None:
                here = (own.ids >= part.start) & (own.ids < part.stop)
                rows[own.ids[here] - part.start] = own.rows[here].float()
            rows.addmm_(delta.a[:, part].float().T, delta.b.float().T, alpha=delta.scale)
            squares += rows.square().sum(0)
        return squares.sqrt()

    def _is_saved(self, module: str) -> bool:
        tied = self._tying.saved and module == self._base.head
        return tied or any(module.endswith(each) for each in self._config.modules_to_save or ())

    def _take(self, name: str) -> torch.Tensor:
        tensor = self._find(name)
        if tensor is None:
            raise AdapterInvalidError(f"{TENSORS}: missing {listed({name})}, which adapter_config.json calls for")
        return tensor

    def _find(self, name: str) -> torch.Tensor | None:
        self._unused.discard(name)
        return self._tensors.get(name)

    def _check(self, name: str, tensor: torch.Tensor, **dimensions: int) -> None:
        check_shape({name: tensor}, name, **dimensions)


def _wrapper(module: str, saved: set[str], targets: Mapping[str, Target], tokens: Mapping[str, object]) -> Wrapper:
    if module in saved:
        return "saved"
    if module in targets:
        return "targeted"
    return "tokens" if module in tokens else "none"


def _resized(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The first rows, or all of them and zeros."""
    if len(tensor) >= count:
        return tensor[:count]
    return torch.cat((tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])))
