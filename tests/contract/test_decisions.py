"""Which version an epoch reads is decided once, on each engine, for whoever asks later."""

import asyncio
import base64
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, select, update

from forebay_server.catalog import queries_datasets
from forebay_server.catalog.clock import now
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_decisions import Choice, Chosen, Decision, Followed, Question
from forebay_server.catalog.tables import decisions
from forebay_server.publish.following import KEEP_SECONDS, Following
from forebay_wire.errors import Conflict, InvalidRequest, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import DatasetManifest, SelectionManifest


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    opened = Catalog.open(catalog_url)
    yield opened
    opened.close()


async def commit(catalog: Catalog, version: int, name: str = "numbers") -> str:
    """A version without shards; its manifest's id."""
    schema = base64.b64encode(b"schema").decode()
    manifest = DatasetManifest(name, version, None, schema, (), {})
    encoded = manifest.encode()
    await catalog.write(
        lambda c: queries_datasets.insert_version(c, manifest, *encoded, new_random_name())
    )
    return encoded[0]


async def select_rows(catalog: Catalog, version: int, of: str, name: str = "train") -> str:
    rule = {"kind": "split", "seed": 0, "start": 0, "stop": 0}
    manifest = SelectionManifest("numbers", version, of, name, 0, rule)
    encoded = manifest.encode()
    await catalog.write(lambda c: queries_datasets.insert_selection(c, manifest, *encoded))
    return encoded[0]


def asked(base: str, epoch: int = 0, selection: str = "", reader: str = "run r") -> Question:
    return Question(reader, epoch, (Followed("numbers", selection, base),))


def decided(*chosen: tuple[int, str, str, int]) -> Decision:
    return Decision(True, tuple(Chosen(*one) for one in chosen))


async def ask(following: Following, question: Question) -> Decision:
    """As a reader does: look, and propose what there is if nobody decided."""
    found = await following.look(question)
    if found.is_decided:
        return found
    return await following.decide(
        question, [Choice(one.manifest, one.selection) for one in found.datasets]
    )


async def test_an_epoch_is_decided_once_and_each_reader_has_its_own(catalog: Catalog) -> None:
    following = Following(catalog)
    first = await commit(catalog, 1)
    assert await ask(following, asked(first)) == decided((1, first, "", 1))
    second = await commit(catalog, 2)
    # The same epoch stays, with another base too; the next one and another reader move on.
    assert await ask(following, asked(second)) == decided((1, first, "", 2))
    assert await ask(following, asked(first, epoch=1)) == decided((2, second, "", 2))
    assert await ask(following, asked(first, reader="other")) == decided((2, second, "", 2))


async def test_many_that_ask_at_once_while_versions_come_agree(catalog: Catalog) -> None:
    following = Following(catalog)
    base = await commit(catalog, 1)

    async def read(epoch: int) -> tuple[int, str]:
        return epoch, (await ask(following, asked(base, epoch))).datasets[0].manifest

    async def append() -> None:
        for version in range(2, 6):
            await commit(catalog, version)

    *answers, _ = await asyncio.gather(*(read(n % 4) for n in range(80)), append())
    assert len(set(answers)) == 4


async def test_the_first_proposal_counts_whatever_the_others_are(catalog: Catalog) -> None:
    following = Following(catalog)
    first, second = await commit(catalog, 1), await commit(catalog, 2)
    stays, moves = [Choice(first, "")], [Choice(second, "")]
    assert await following.decide(asked(first), stays) == decided((1, first, "", 2))
    assert await following.decide(asked(first), moves) == decided((1, first, "", 2))
    train = await select_rows(catalog, 1, first)
    with pytest.raises(NotFound, match="what was proposed"):
        await following.decide(asked(first, 1, "train"), [Choice(second, train)])
    with pytest.raises(NotFound, match="what was proposed"):
        await following.decide(asked(first, 1), [Choice("0" * 64, "")])


async def test_all_datasets_of_an_epoch_are_decided_together(catalog: Catalog) -> None:
    following = Following(catalog)
    names = ("one", "two")
    olds = [await commit(catalog, 1, name) for name in names]
    question = Question("run r", 3, tuple(map(Followed, names, ("", ""), olds)))
    early = await following.look(question)
    news = [await commit(catalog, 2, name) for name in names]
    late = await following.look(question)
    assert [one.version for one in (*early.datasets, *late.datasets)] == [1, 1, 2, 2]
    both = decided((2, news[0], "", 2), (2, news[1], "", 2))
    assert await following.decide(question, [Choice(one, "") for one in news]) == both
    # Who looked before and comes after gets both, not one of each.
    assert await following.decide(question, [Choice(one, "") for one in olds]) == both
    # One that is no version decides nothing for the other, either.
    other = Question("run r", 4, question.datasets)
    with pytest.raises(NotFound, match="what was proposed"):
        await following.decide(other, [Choice(news[0], ""), Choice("0" * 64, "")])
    assert not (await following.look(other)).is_decided
    fewer = Question("run r", 3, question.datasets[:1])
    with pytest.raises(Conflict, match="decided for other datasets"):
        await following.look(fewer)
    with pytest.raises(InvalidRequest, match="one choice for each"):
        await following.decide(other, [Choice(news[0], "")])


async def test_of_a_selection_it_is_the_newest_version_that_has_it(catalog: Catalog) -> None:
    following = Following(catalog)
    first, train = await commit(catalog, 1), ""
    train = await select_rows(catalog, 1, first)
    second = await commit(catalog, 2)
    assert await ask(following, asked(first, 0, "train")) == decided((1, first, train, 2))
    newer = await select_rows(catalog, 2, second)
    assert await ask(following, asked(first, 1, "train")) == decided((2, second, newer, 2))
    with pytest.raises(NotFound, match="no version of dataset numbers has a split 'test'"):
        await ask(following, asked(first, 2, "test"))


async def test_a_dataset_that_went_or_was_made_anew_is_not_followed(catalog: Catalog) -> None:
    following = Following(catalog)
    first = await commit(catalog, 1)
    await commit(catalog, 2)
    await ask(following, asked(first))
    await catalog.write(lambda c: queries_datasets.delete_dataset(c, "numbers"))
    with pytest.raises(NotFound, match="deleted since"):
        await ask(following, asked(first))
    with pytest.raises(NotFound, match="no dataset numbers any more"):
        await ask(following, asked(first, epoch=1))
    with pytest.raises(NotFound, match="its dataset was deleted"):
        await following.manifest(first)
    await commit(catalog, 3)  # another one of that name
    with pytest.raises(Conflict, match="another one than that which was read"):
        await ask(following, asked(first, epoch=1))


async def test_a_decision_is_kept_as_long_as_anybody_asks(catalog: Catalog) -> None:
    following = Following(catalog)
    first = await commit(catalog, 1)
    await ask(following, asked(first))
    await commit(catalog, 2)

    async def age(seconds: float) -> None:
        await catalog.write(lambda c: c.execute(update(decisions).values(expires=now() + seconds)))

    def seconds_left(connection: Connection) -> float:
        return connection.scalar(select(decisions.c.expires - now())) or 0.0

    await age(KEEP_SECONDS / 4)
    assert (await ask(following, asked(first))).datasets[0].version == 1
    assert await catalog.read(seconds_left) > KEEP_SECONDS * 0.9
    await age(-1)
    assert (await ask(following, asked(first))).datasets[0].version == 2


async def test_what_is_no_question_is_refused(catalog: Catalog) -> None:
    following = Following(catalog)
    base = await commit(catalog, 1)
    for wrong in (
        Question("run r", 0, ()),
        asked(base, reader=""),
        asked(base, reader="x" * 257),
        asked(base, epoch=-1),
    ):
        with pytest.raises(InvalidRequest):
            await following.look(wrong)
