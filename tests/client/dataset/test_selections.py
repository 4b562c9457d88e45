"""Stored selections: what a filter, a list of rows or a bucket chooses, read like a split."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forebay
from forebay.dataset import select

ROWS = 5000
PARTS = ("train", "test")


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(7)
    numbers = rng.integers(-50, 50, ROWS)
    return pa.table(
        {
            "number": numbers,
            "maybe": np.where(rng.random(ROWS) < 0.2, np.nan, numbers),
            "text": pa.array(
                [chr(97 + number % 7) * (number % 5) for number in range(ROWS)],
                mask=rng.random(ROWS) < 0.1,
            ),
            "list": pa.array([[number] * (number % 9) for number in range(ROWS)]),
            "order": np.arange(ROWS) // 100,
        }
    )


@pytest.fixture(scope="module")
def _written(daemon, table):
    fields = [field.with_nullable(field.name == "text") for field in table.schema]
    with (
        forebay.connect(daemon.data) as client,
        client.create_dataset(
            "chosen", pa.schema(fields), shard_bytes=64 * 1024, batch_bytes=8 * 1024
        ) as writer,
    ):
        writer.write_table(table)


@pytest.fixture
def dataset(client, _written):
    """ROWS rows in several shards of several record batches."""
    found = client.dataset("chosen")
    assert len(found.manifest.shards) > 3
    return found


def rows_of(client, name, split):
    chosen = client.dataset(name, split=split)
    return chosen.rows_at(np.arange(len(chosen), dtype=np.int64))


# Filters.


def leaves():
    number = st.integers(-60, 60)
    compare = st.sampled_from(["__lt__", "__ge__", "__eq__", "__ne__"])
    column = st.sampled_from(["number", "maybe", "order"])
    return st.one_of(
        st.builds(lambda name, how, to: getattr(pc.field(name), how)(to), column, compare, number),
        st.builds(lambda text: pc.starts_with(pc.field("text"), text), st.sampled_from("abcg")),
        st.builds(lambda some: pc.field("number").isin(some), st.lists(number, min_size=1)),
        st.builds(lambda: pc.field("text").is_null()),
        st.builds(lambda to: pc.list_value_length(pc.field("list")) > to, st.integers(0, 9)),
    )


def expressions():
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=4,
    )


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(expression=expressions(), seed=st.integers(0, 99), batch=st.integers(100, 700))
def test_a_filter_chooses_what_arrow_filters_and_an_epoch_has_each_once(
    client, dataset, table, expression, seed, batch
):
    whole = dataset.table()
    numbered = whole.append_column("row", pa.array(np.arange(ROWS)))
    expected = numbered.filter(expression)["row"].to_numpy()
    name = f"random-{abs(hash((str(expression), client.transfer.__class__.__name__)))}"
    if not len(expected):
        with pytest.raises(forebay.InvalidRequest, match=r"would be empty: none of 5000 rows"):
            dataset.define_selection(name, filter=expression)
        return
    assert dataset.define_selection(name, filter=expression) == len(expected)
    chosen = client.dataset("chosen", split=name)
    assert np.array_equal(rows_of(client, "chosen", name), expected)
    without_nan = [column for column in whole.column_names if column != "maybe"]
    both = [one.select(without_nan) for one in (chosen.table(), whole.filter(expression))]
    assert both[0].equals(both[1])
    loader = forebay.DataLoader(
        chosen, global_batch_size=batch, shuffle="full", seed=seed, include_ids=True,
        columns=["number"], rank=0, world_size=1,
    )  # fmt: skip
    ids = np.concatenate([one["_ids"].numpy() for one in loader])
    assert np.array_equal(np.sort(ids), expected)


def test_a_filter_is_stored_as_runs_or_as_rows(client, dataset):
    dataset.define_selection("runs", filter=pc.field("order") >= 25)
    dataset.define_selection("rows", filter=[("number", "<", 0)])
    encodings = {
        name: client.dataset("chosen", split=name).selection.rule["encoding"]
        for name in ("runs", "rows")
    }
    assert encodings == {"runs": "runs", "rows": "rows"}
    assert rows_of(client, "chosen", "runs").tolist() == list(range(2500, 5000))


@pytest.mark.parametrize("max_runs", [0, 10])
def test_many_rows_are_stored_in_several_batches(client, dataset, table, monkeypatch, max_runs):
    monkeypatch.setattr(select, "MAX_RUNS", max_runs)
    monkeypatch.setattr(select, "BLOB_BYTES", 1024)
    monkeypatch.setattr(select, "BLOCK_ROWS", 100)
    name = f"many-{max_runs}-{client.transfer.__class__.__name__}"
    chosen = dataset.define_selection(name, filter=pc.bit_wise_and(pc.field("number"), 1) == 1)
    expected = np.flatnonzero(table["number"].to_numpy() & 1)
    assert chosen == len(expected)
    assert np.array_equal(rows_of(client, "chosen", name), expected)
    shards = client.dataset("chosen", split=name).selection.shards
    batches = [rows for shard in shards for rows in shard.batch_rows]
    assert batches == [256] * (len(expected) // 256) + [len(expected) % 256]


def test_progress_is_told_how_much_is_done(dataset):
    told = []
    dataset.define_selection(
        f"told-{dataset._client().transfer.__class__.__name__}",
        filter=pc.field("number") > 10,
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(told) > 10
    assert told == sorted(told)
    assert told[-1] == (ROWS, ROWS)


def test_a_repeat_is_a_no_op_and_another_definition_is_refused(client, dataset):
    many = pc.field("number").isin(list(range(40)))  # its text does not show all of it
    for _ in range(2):
        dataset.define_selection("again", filter=pc.field("number") > 5)
        dataset.define_selection("listed", filter=many)
        dataset.define_selection("given", rows=[5, 3, 9])
    told = []
    dataset.define_selection("again", filter=pc.field("number") > 5, progress=told.append)
    assert told == []
    differing = r"again already: \d+ rows by filter \(number > 5\); asked for: filter \(number > 6"
    with pytest.raises(forebay.AlreadyExists, match=differing):
        dataset.define_selection("again", filter=pc.field("number") > 6)
    with pytest.raises(forebay.AlreadyExists, match=r"listed already"):
        dataset.define_selection(
            "listed", filter=pc.field("number").isin([*range(19), 47, *range(20, 40)])
        )
    for rows in ([5, 3, 8], [3, 5]):
        with pytest.raises(forebay.AlreadyExists, match=r"given already: 3 rows by list of rows"):
            dataset.define_selection("given", rows=rows)
    with pytest.raises(forebay.AlreadyExists, match=r"again already"):
        dataset.define_splits({"again": 0.5})


@pytest.mark.parametrize(
    ("filter", "why"),
    [
        (
            pc.field("nope") > 5,
            r"\(nope > 5\) cannot be computed: No match .*nope.*columns are .*n",
        ),
        (pc.field("text") > 5, r"cannot be computed: .*no kernel"),
        (pc.field("number") + 1, r"is int64, a filter has to be true or false"),
        (pc.field("number") > 1000, r"'bad' .* would be empty"),
        (pc.divide(pc.field("number"), 0) > 1, r"cannot be computed: divide by zero"),
        ("number > 5", r"is no filter"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(client, dataset, filter, why):
    with pytest.raises(forebay.InvalidRequest, match=why):
        dataset.define_selection("bad", filter=filter)
    with pytest.raises(forebay.NotFound):
        client.dataset("chosen", split="bad")


# Lists of rows.


def test_rows_are_kept_in_the_order_of_the_version(client, dataset):
    rows = np.random.default_rng(1).permutation(ROWS)[:700].astype(np.uint16)
    assert dataset.define_selection("some", rows=rows) == 700
    assert np.array_equal(rows_of(client, "chosen", "some"), np.sort(rows))
    sample = client.dataset("chosen", split="some")[3]
    assert sample["number"] == dataset[int(np.sort(rows)[3])]["number"]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "would be empty"),
        ([1, 2, 1], "row 1 is given twice"),
        ([-1], "there is no row -1, rows are 0 to 4999"),
        ([ROWS], "there is no row 5000"),
        ([1.5], "whole numbers"),
        ([[1]], "flat list"),
    ],
)
def test_rows_that_cannot_be_are_refused(dataset, rows, why):
    with pytest.raises(forebay.InvalidRequest, match=why):
        dataset.define_selection("bad", rows=rows)


def test_exactly_one_way_to_choose_is_given(dataset):
    for ways in ({}, {"rows": [1], "filter": pc.field("number") > 1}):
        with pytest.raises(forebay.InvalidRequest, match="exactly one of filter and rows"):
            dataset.define_selection("bad", **ways)


# Buckets.


def test_buckets_share_out_all_rows_by_length(client, dataset, table):
    length = pc.list_value_length(pc.field("list"))
    lengths = pc.list_value_length(table["list"]).to_numpy()
    for _ in range(2):
        found = dataset.define_buckets(length, [3, 6], prefix="len")
    assert list(found) == ["len0", "len1", "len2"]
    bounds = [(-1, 3), (3, 6), (6, 99)]
    for (name, count), (low, high) in zip(found.items(), bounds, strict=True):
        expected = np.flatnonzero((lengths >= low) & (lengths < high))
        assert count == len(expected)
        assert np.array_equal(rows_of(client, "chosen", name), expected)
    assert sum(dataset.define_buckets("number", [0]).values()) == ROWS
    with pytest.raises(forebay.AlreadyExists, match=r"len0 already.*< 3; asked for: .* < 4"):
        dataset.define_buckets(length, [4, 6], prefix="len")


@pytest.mark.parametrize(
    ("value", "boundaries", "why"),
    [
        ("number", [], "no boundaries"),
        ("number", [2, 1], "no boundaries"),
        ("number", [float("nan")], "no boundaries"),
        ("text", [1], "is string, not a number; of text take"),
        ("nope", [1], "No match .*nope"),
        ("maybe", [1], "no value in some rows"),
        ("number", [0, 1000], r"'none-bad2' .* would be empty"),
        (5, [1], "neither a column nor"),
    ],
)
def test_buckets_that_cannot_be_are_refused(client, dataset, value, boundaries, why):
    with pytest.raises(forebay.InvalidRequest, match=why):
        dataset.define_buckets(value, boundaries, prefix="none-bad")
    assert "none-bad0" not in {one.name for one in client.describe_dataset("chosen").selections}


def test_what_a_version_has_is_what_its_selections_have_too(client, dataset):
    def num_blobs():  # as for pins
        copies = client.why("dataset chosen@1").copies
        return sum(one.num_blobs for one in copies if (one.tier, one.state) == ("ssd", "live"))

    before = num_blobs()
    rows = range(before, ROWS, 3)  # another list for each way
    dataset.define_selection(f"kept-{before}", rows=rows)
    assert num_blobs() == before + 1


# Within a split.


@pytest.fixture
def splits(client, dataset):
    """Splits of all kinds of the same rows' dataset: name to its rows, in its order."""
    dataset.define_splits({"train": 0.7, "test": 0.3}, seed=4)
    dataset.define_folds(3, seed=5, prefix="whole")
    dataset.define_selection("evens", rows=range(0, ROWS, 2))
    dataset.define_selection("low", filter=pc.field("number") < 10)
    client.dataset("chosen", split="low").define_folds(4, seed=1)
    client.dataset("chosen", split="train").define_folds(4, seed=1)
    names = ["train", "whole2-train", "evens", "low", "low-fold3-train", "train-fold3-train"]
    return {name: rows_of(client, "chosen", name) for name in names}


def test_a_filter_within_a_split_chooses_of_its_rows_alone(client, dataset, table, splits, way):
    chosen = np.flatnonzero(table["number"].to_numpy() % 3 == 0)
    third = pc.field("number") - pc.divide(pc.field("number"), 3) * 3 == 0
    for name, rows in splits.items():
        split = client.dataset("chosen", split=name)
        seen: list[tuple[int, int]] = []
        count = split.define_selection(
            f"{name}-{way}", filter=third, progress=lambda *told, seen=seen: seen.append(told)
        )
        found = rows_of(client, "chosen", f"{name}-{way}")
        assert found.tolist() == sorted(set(rows.tolist()) & set(chosen.tolist()))
        assert count == len(found)
        assert seen[-1] == (len(rows), len(rows))
        split.define_selection(f"{name}-{way}", filter=third)  # again
        assert f"within {name}" in described(client, f"{name}-{way}")
    with pytest.raises(forebay.AlreadyExists, match=r"asked for: filter .*Selections never change"):
        dataset.define_selection(f"train-{way}", filter=third)


def described(client, name) -> str:
    from forebay_wire.selection import describe_rule

    return describe_rule(client.dataset("chosen", split=name).selection.rule)


def test_a_filter_within_a_split_is_computed_of_its_rows_alone(client, dataset, way):
    dataset.define_selection("no-zeros", filter=pc.field("number") != 0)
    divides = pc.divide(pc.scalar(100), pc.field("number")) > 3
    with pytest.raises(forebay.InvalidRequest, match="divide by zero"):
        dataset.define_selection(f"divided-{way}", filter=divides)
    within = client.dataset("chosen", split="no-zeros")
    assert within.define_selection(f"divided-{way}", filter=divides) > 0
    dataset.define_selection("there", filter=~pc.field("maybe").is_nan())
    made = client.dataset("chosen", split="there").define_buckets("maybe", [0, 10])
    assert list(made) == ["there-bucket0", "there-bucket1", "there-bucket2"]
    assert sum(made.values()) == len(client.dataset("chosen", split="there"))


def test_rows_within_a_split_are_its_own(client, splits):
    for name, rows in splits.items():
        split = client.dataset("chosen", split=name)
        some = rows[: len(rows) // 3]
        split.define_selection(f"{name}-some", rows=some)
        assert rows_of(client, "chosen", f"{name}-some").tolist() == sorted(some.tolist())
        foreign = np.setdiff1d(np.arange(ROWS), rows)[7]
        with pytest.raises(forebay.InvalidRequest, match=f"row {foreign} is not in the split"):
            split.define_selection("bad", rows=[*some.tolist(), int(foreign)])


def test_folds_within_a_split_share_out_its_rows(client, dataset, splits):
    for name, rows in splits.items():
        split = client.dataset("chosen", split=name)
        names = split.define_folds(3, seed=2, prefix=f"{name}-in")
        assert names == split.define_folds(3, seed=2, prefix=f"{name}-in")
        tests = []
        for train, test in names:
            both = [rows_of(client, "chosen", one).tolist() for one in (train, test)]
            assert sorted(both[0] + both[1]) == sorted(rows.tolist())
            tests.append(both[1])
        assert sorted(sum(tests, [])) == sorted(rows.tolist())  # noqa: RUF017 - three lists
        assert max(map(len, tests)) - min(map(len, tests)) <= 1
        assert sorted(tests[0]) != sorted(rows.tolist())[: len(tests[0])]
        other = split.define_folds(3, seed=3, prefix=f"{name}-other")
        assert rows_of(client, "chosen", other[0][1]).tolist() != tests[0]
        with pytest.raises(forebay.AlreadyExists, match="Selections never change"):
            split.define_folds(3, seed=3, prefix=f"{name}-in")
    dataset.define_selection("four", rows=range(4))
    with pytest.raises(forebay.InvalidRequest, match=r"folds of .* rows: a fold would be empty"):
        client.dataset("chosen", split="four").define_folds(5, prefix="too-many")


def test_loaders_read_folds_within_splits_and_the_daemon_plans_them(client, dataset, splits):
    for name in ("train", "low"):
        fold = client.dataset("chosen", split=f"{name}-fold1-test")
        with forebay.DataLoader(
            fold, global_batch_size=64, shuffle="full", columns=["number"], include_ids=True
        ) as loader:
            found = [number for batch in loader for number in batch["_ids"].tolist()]
            assert loader.report().plan_problem == ""
        assert sorted(found) == sorted(rows_of(client, "chosen", fold.split).tolist())
        with forebay.DataLoader(
            fold, global_batch_size=64, shuffle="block", block_rows=32, columns=["number"]
        ) as loader:
            assert sum(len(batch["number"]) for batch in loader) == len(fold)


def test_what_is_chosen_within_splits_stays_with_rows_whose_other_columns_change(client, name):
    with client.create_dataset(name, {"number": "int64", "other": "int64"}) as writer:
        for number in range(40):
            writer.write(number=number, other=-number)
    dataset = client.dataset(name)
    dataset.define_splits({"train": 0.5}, seed=1)
    dataset.define_selection("few", filter=pc.field("other") > -20)
    client.dataset(name, split="train").define_folds(2)
    client.dataset(name, split="train").define_selection("n", filter=pc.field("number") > 3)
    client.dataset(name, split="few").define_folds(2)
    client.dataset(name, split="few").define_selection("m", filter=pc.field("number") > 3)
    stays = ["train-fold0-train", "train-fold1-test", "n"]
    before = {one: rows_of(client, name, one).tolist() for one in stays}
    dataset.add_columns(
        lambda rows: {"other": rows["number"] * 2}, columns=["number"], replace=True
    )
    there = {one.name for one in client.describe_dataset(name).selections if one.version == 2}
    assert there == {"train", "n", *(f"train-fold{n}-{part}" for n in (0, 1) for part in PARTS)}
    assert {one: rows_of(client, name, one).tolist() for one in stays} == before
    client.dataset(name, split="train").define_folds(2)  # again


def test_a_list_within_a_filter_goes_with_it(client, name):
    """Where the filter's column changes, the list may hold what is held out then."""
    with client.create_dataset(name, {"part": "string", "x": "int64"}) as writer:
        parts = ["train"] * 15 + ["test"] * 5
        writer.write_table(pa.table({"part": parts, "x": range(20)}))
    client.dataset(name).define_selection("train", filter=[("part", "==", "train")])
    train = client.dataset(name, split="train")
    train.define_selection("core", rows=range(10))
    client.dataset(name, split="core").define_folds(2)
    client.dataset(name).define_selection("own", rows=range(3))
    client.dataset(name).add_columns(lambda rows: {"y": rows["x"]}, columns=["x"])
    names = {one.name for one in client.describe_dataset(name).selections if one.version == 2}
    assert {"train", "core", "core-fold0-train", "own"} <= names
    with client.write_columns(name, {"part": "string"}, replace=True) as writer:
        writer.write_table(pa.table({"part": parts[::-1]}))
    names = {one.name for one in client.describe_dataset(name).selections if one.version == 3}
    assert names == {"own"}


def test_a_split_is_shared_out_by_folds(client, name):
    with client.create_dataset(name, {"x": "int64"}) as writer:
        writer.write_table(pa.table({"x": range(20)}))
    client.dataset(name).define_folds(4)
    part = client.dataset(name, split="fold0-train")
    with pytest.raises(forebay.InvalidRequest, match=r"define_folds\(k\) shares out the rows"):
        part.define_splits({"fit": 0.9, "val": 0.1})
