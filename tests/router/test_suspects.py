"""Requests that kill replicas are identified, and other requests do not lose tokens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_protos.errors import GenerationError, LoraplexError, UnavailableError
from loraplex_router.api.http.app import FACES
from loraplex_router.api.http.face import face_of
from loraplex_router.engine.generation import Generation
from loraplex_router.engine.suspects import CONVICTING_FAILURES, CONVICTING_LOSSES, Loss, acquit
from loraplex_router.replicas.replica import Replica
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.grammar import Grammar, GrammarKind
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sequence import Chunk, Plan, Sequence
from tests.router.test_engine import Setup

DEADLY = 500
GONE, FAILED = UnavailableError("rank 0 is gone"), LoraplexError("rank 0 failed: RuntimeError")


class Cluster(Setup):
    """A service over replicas that restart whenever they die; one token, among other things, kills them."""

    def __init__(self, replicas: int, death: LoraplexError) -> None:
        self.death = death
        self.lost = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.generations: list[Generation] = []
        super().__init__(move_seconds=60)
        self.start(self.replica)
        for number in range(1, replicas):
            self.start(self.add_replica(str(number)))

    def start(self, replica: Replica) -> None:
        self.tasks.add(asyncio.create_task(self.keep(replica)))

    async def keep(self, replica: Replica) -> None:
        """Runs a replica and replaces it when it is lost, as `Connections` and a supervisor do."""
        while True:
            replica.shards.deadly_token, replica.shards.death = DEADLY, self.death
            tasks = [asyncio.create_task(replica.engine.run()), asyncio.create_task(replica.shards.gone.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self.replicas.remove(replica)
            self.lost += 1
            await asyncio.sleep(0)
            replica = self.add_replica(replica.name)

    @property
    def unfinished(self) -> list[Sequence]:
        return [output.sequence for generation in self.generations for output in generation.unfinished]

    def kill(self, number: int) -> None:
        replicas = list(self.replicas)
        if replicas:
            replicas[number % len(replicas)].shards.gone.set()

    async def ask(self, first: int, tokens: int, adapter: bool = False, n: int = 1) -> list[list[int]] | LoraplexError:
        """Each sequence's tokens, or the error."""
        reference = AdapterReference("a") if adapter else None
        generation = await self.service.generate(
            Request(prompt=(first - 1, first), adapter=reference, max_new_tokens=tokens, n=n)
        )
        self.generations.append(generation)
        try:
            return [[sample.token for sample in delta.samples] for delta in await generation.collect()]
        except LoraplexError as error:
            return error
        finally:
            self.service.requests.close(generation)


@asynccontextmanager
async def cluster(replicas: int = 1, death: LoraplexError = GONE) -> AsyncIterator[Cluster]:
    made = Cluster(replicas, death)
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)
    assert all(not replica.blocks.used and replica.engine.idle for replica in made.replicas)


def follow(first: int, tokens: int, step: int = 1) -> list[int]:
    return [first + step * place for place in range(1, tokens + 1)]


innocent = st.tuples(st.integers(1, 200), st.integers(1, 60), st.booleans())
culprit = st.integers(0, 30)  # tokens before the deadly one


@given(
    replicas=st.integers(1, 3),
    death=st.sampled_from([GONE, FAILED]),
    innocents=st.lists(innocent, max_size=20),
    culprits=st.lists(culprit, min_size=1, max_size=2),
    late=st.integers(0, 40),
    kills=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), max_size=1),
)
@settings(max_examples=60, deadline=None)
async def test_only_the_request_that_kills_replicas_is_ended(
    replicas: int,
    death: LoraplexError,
    innocents: list[tuple[int, int, bool]],
    culprits: list[int],
    late: int,
    kills: list[tuple[int, int]],
):
    async with cluster(replicas, death) as made:
        asked = [asyncio.create_task(made.ask(*one)) for one in innocents]
        for _ in range(late):
            await asyncio.sleep(0)
        guilty = [asyncio.create_task(made.ask(DEADLY - before, 50)) for before in culprits]
        for steps, number in kills:
            for _ in range(steps):
                await asyncio.sleep(0)
            made.kill(number)
        for answer in await asyncio.gather(*guilty):
            assert isinstance(answer, GenerationError) and "so it was ended" in answer.message
        for (first, tokens, adapter), answer in zip(innocents, await asyncio.gather(*asked), strict=True):
            assert answer == [follow(first, tokens, 2 if adapter else 1)]
        # Once a request is convicted, earlier losses no longer count against the others.
        most = sum((CONVICTING_LOSSES + 1) * (number + 1) for number in range(len(culprits)))
        assert made.lost <= most + len(kills)


@given(
    innocents=st.lists(innocent, min_size=1, max_size=20),
    pauses=st.lists(st.integers(4, 30), max_size=20),
    replicas=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
async def test_requests_that_get_tokens_in_between_survive_any_number_of_kills(
    innocents: list[tuple[int, int, bool]], pauses: list[int], replicas: int
):
    async with cluster(replicas) as made:
        asked = [asyncio.create_task(made.ask(*one)) for one in innocents]
        for number, pause in enumerate(pauses):
            for _ in range(pause):
                await asyncio.sleep(0)
            while any(len(sequence.tokens) <= sequence.lost_at.stop for sequence in made.unfinished):
                await asyncio.sleep(0)
            made.kill(number)
        for (first, tokens, adapter), answer in zip(innocents, await asyncio.gather(*asked), strict=True):
            assert answer == [follow(first, tokens, 2 if adapter else 1)]


async def test_a_request_is_convicted_when_a_shard_fails_on_it_for_the_second_time():
    async with cluster(death=FAILED) as made:
        asked = [asyncio.create_task(made.ask(first, 60)) for first in range(1, 7)]
        assert isinstance(await made.ask(DEADLY - 5, 50), GenerationError)
        assert made.lost == CONVICTING_FAILURES
        assert await asyncio.gather(*asked) == [[follow(first, 60)] for first in range(1, 7)]


async def test_each_sequence_of_a_request_is_a_separate_suspect():
    async with cluster() as made:
        asked = asyncio.create_task(made.ask(1, 60))
        assert isinstance(await made.ask(DEADLY - 5, 50, n=3), GenerationError)
        assert await asked == [follow(1, 60)]
        assert made.lost == CONVICTING_LOSSES


async def test_new_requests_do_not_wait_for_suspects():
    async with cluster(death=FAILED) as made:
        suspects = [asyncio.create_task(made.ask(first, 60)) for first in range(1, 4)]
        guilty = asyncio.create_task(made.ask(DEADLY - 20, 50))
        while not made.lost or not made.replicas.ready.is_set():
            await asyncio.sleep(0)
        assert await made.ask(300, 5) == [follow(300, 5)]
        assert not any(task.done() for task in suspects)
        assert isinstance(await guilty, GenerationError)
        assert await asyncio.gather(*suspects) == [[follow(first, 60)] for first in range(1, 4)]


async def test_a_request_whose_preparation_kills_replicas_is_given_up_without_blaming_others():
    async with cluster(replicas=2) as made:
        asked = asyncio.create_task(made.ask(1, 150))
        grammar = Grammar(GrammarKind.REGEX, "deadly")
        for _ in range(2):
            with pytest.raises(GenerationError, match="3 replicas"):
                await made.service.generate(Request(prompt=(1,), grammar=grammar))
        assert await asked == [follow(1, 150)]


async def test_requests_that_wait_for_an_adapter_continue_elsewhere_if_the_replica_is_lost():
    async with cluster() as made:
        made.shards.load_error = GONE
        assert await made.ask(1, 5, adapter=True) == [follow(1, 5, 2)]
        assert made.lost == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_clients_are_told_not_to_retry_a_deadly_request(path: str):
    face = face_of(path, FACES)
    answer = face.answer(GenerationError("3 replicas were lost"))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")  # as OpenAI's clients read it
    assert "x-should-retry" not in face.answer(UnavailableError("later")).headers


# ---- the policy alone ------------------------------------------------------------------------------------------


def sequence(number: int = 0) -> Sequence:
    return Sequence(number, 10, list(range(10)), Adapter("", 0, 0), max_new_tokens=50)


def plan(*chunks: tuple[Sequence, int, int]) -> Plan:
    made = [
        Chunk(sequence, start, length, samples=True, slot=0, new_blocks=(), attempt=1)
        for sequence, start, length in chunks
    ]
    return Plan((), tuple(made))


def test_a_conviction_takes_several_losses_at_the_same_token():
    alone = sequence()
    for number in range(1, CONVICTING_LOSSES + 1):
        guilty = Loss((plan((alone, 0, 10)), plan((alone, 10, 1)))).accuse()
        assert guilty is (alone if number == CONVICTING_LOSSES else None)
    alone = sequence()
    for start in (0, 2, 4, 30, 6, 50, 10, 20, 2):  # each time, it is before or after the position
        assert not Loss((plan((alone, start, 1)), plan((alone, start + 1, 1)))).accuse()


def test_the_position_is_the_one_that_all_losses_share():
    alone = sequence()
    starts = (0, 8, 4, 9, 8)
    assert [Loss((plan((alone, start, 10)),)).accuse() for start in starts] == [None] * 4 + [alone]
    assert alone.lost_at == range(9, 10)
    assert alone.alone_until == 10


def test_nobody_is_convicted_while_others_run_too():
    first, second = sequence(1), sequence(2)
    for _ in range(10):
        assert not Loss((plan((first, 0, 10), (second, 0, 10)),), failed=True).accuse()


def test_other_work_of_the_replica_requires_one_more_loss():
    alone = sequence()
    for _ in range(CONVICTING_LOSSES):
        assert not Loss((plan((alone, 0, 10)),), busy=True).accuse()
    assert Loss((plan((alone, 0, 10)),), busy=True).accuse() is alone


def test_suspects_are_alone_up_to_where_the_replica_was_lost():
    suspect = sequence()
    Loss((plan((suspect, 0, 10)),)).accuse()
    assert not suspect.suspect  # at first, all continue together
    Loss((plan((suspect, 0, 10)),)).accuse()
    assert suspect.suspect
    suspect.computed = 10
    assert not suspect.suspect
    suspect.computed = 0
    acquit([suspect])
    assert not suspect.suspect
