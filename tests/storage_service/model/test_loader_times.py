"""What loaders tell of their time: refused where it is none, added once, whatever is told again."""

import pytest

from forebay_server.model.loader_times import MAX_CAUSES, LoaderTimes, LoaderTotals
from forebay_wire.errors import InvalidRequest


def told(**changes):
    return {
        "name": "one",
        "samples": 10,
        "batches": 2,
        "seconds": 4.0,
        "wait_seconds": 1.0,
        "stalls": {"origin": 1.0},
        "reading": {"origin": 1.5, "decode": 0.5},
        "advice": "look there",
        **changes,
    }


def test_what_is_told_is_taken_as_it_is():
    times = LoaderTimes.parse(told(later_field="of a newer client"))
    assert (times.samples, times.wait_seconds, times.advice) == (10, 1.0, "look there")
    assert times.stalls == {"origin": 1.0}
    assert times.masked_samples == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "no object",
        told(name=""),
        told(samples=-1),
        told(seconds=float("nan")),
        told(samples=True),
        told(stalls=[1]),
        told(stalls={"origin": "long"}),
        told(reading={'x"} 1\nforebay_up': 1.0}),
        told(reading={f"cause{number}": 1.0 for number in range(MAX_CAUSES + 1)}),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(InvalidRequest, match="loader's times"):
        LoaderTimes.parse(wrong)


def test_totals_add_what_is_new_of_each_loader():
    totals = LoaderTotals()
    for samples, origin in ((10, 1.0), (10, 1.0), (25, 1.75)):
        totals.add(LoaderTimes.parse(told(samples=samples, stalls={"origin": origin})))
    totals.add(LoaderTimes.parse(told(name="two", masked_samples=3)))
    assert totals.samples == 35
    assert totals.stalls == {"origin": pytest.approx(2.75)}
    assert totals.reading == {"origin": 3.0, "decode": 1.0}
    assert totals.masked_samples == 3


def test_totals_never_shrink_and_their_causes_are_bounded():
    totals = LoaderTotals()
    totals.add(LoaderTimes.parse(told()))
    totals.add(LoaderTimes.parse(told(samples=0, stalls={"origin": 0.5})))
    assert (totals.samples, totals.stalls["origin"]) == (10, 1.0)
    for number in range(3):
        stalls = {f"made_up_{number}_{cause}": 1.0 for cause in range(MAX_CAUSES)}
        totals.add(LoaderTimes.parse(told(name=f"loader {number}", stalls=stalls)))
    assert len(totals.stalls) == MAX_CAUSES
