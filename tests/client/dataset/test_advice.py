"""One sentence of advice: a table of sums and what they say."""

import pytest

from forebay.dataset.advice import Habits, PlanFit, Workload, advise

GB = 10**9
SHORT = PlanFit(100 * GB, {"ssd": 59 * GB})
FITS = PlanFit(10 * GB, {"ssd": 59 * GB})
TWO_TIERS = PlanFit(100 * GB, {"ssd": 30 * GB, "hdd": 200 * GB})
TWO_SHORT = PlanFit(3500 * GB, {"ssd": 30 * GB, "hdd": 200 * GB})


def work(seconds=100.0, reading_seconds=0.0, **stalls):
    return Workload(seconds, stalls, reading_seconds or sum(stalls.values()), num_cpus=8)


@pytest.mark.parametrize(
    ("sums", "fit", "said"),
    [
        (work(0.0), None, ""),
        (
            work(origin=30.0, tier=5.0, network=3.0, transform=20.0),
            SHORT,
            "reading is 38 % of the step: the SSD tier is 41 GB short of this plan",
        ),
        (
            work(throttle=38.0),
            TWO_SHORT,
            "reading is 38 % of the step: the SSD and HDD tiers are 3.3 TB short of this plan",
        ),
        (
            work(origin=38.0),
            FITS,
            "reading is 38 % of the step: it comes from the object tier or the origin: warm it "
            "first (forebay dataset warm)",
        ),
        (
            work(origin=38.0),
            None,
            "reading is 38 % of the step: it comes from the object tier or the origin: warm it "
            "first (forebay dataset warm)",
        ),
        (
            work(throttle=10.0),
            FITS,
            "reading is 10 % of the step: a bandwidth limit, or a store that is busy, holds it "
            "back: raise the limit",
        ),
        (
            work(tier=38.0),
            TWO_TIERS,
            "reading is 38 % of the step: the SSD tier is 70 GB short of this plan",
        ),
        (
            work(queue=38.0),
            FITS,
            "reading is 38 % of the step: the daemon is busy with other work: let fewer readers "
            "run at a time",
        ),
        (
            work(transform=61.0, decode=9.0, reading_seconds=110.0),
            None,
            "transform is 61 % of the step: give num_threads=4, or take a cheaper transform",
        ),
        (
            work(transform=61.0, reading_seconds=1e6),
            None,
            "transform is 61 % of the step: give num_threads=8, or take a cheaper transform",
        ),
        (
            Workload(10.0, {"transform": 9.0}, 40.0, num_threads=2, num_cpus=2),
            None,
            "transform is 90 % of the step: take a cheaper transform",
        ),
        (
            work(decode=50.0),
            None,
            "decode is 50 % of the step: give num_threads=2, or take fewer columns (columns=[…]), "
            'or shuffle in blocks (shuffle="block")',
        ),
        (
            work(verify=50.0),
            None,
            "verify is 50 % of the step: bytes are checked at their first use, so later epochs go "
            "faster while shards stay open",
        ),
        (
            work(decode=0.5, copy=0.5),
            SHORT,
            "the trainer is the bottleneck: data was ready 99 % of the time",
        ),
        (
            Workload(40.0, {"transform": 10.0}, 10.0, whole="the workers' time"),
            None,
            "the trainer is the bottleneck: workers were idle 75 % of their time",
        ),
        (
            Workload(
                40.0,
                {"transform": 39.0, "decode": 1.0},
                40.0,
                num_threads=2,
                num_cpus=4,
                option="num_workers",
                whole="the workers' time",
            ),
            None,
            "transform is 98 % of the workers' time: give num_workers=4, or take a cheaper "
            "transform",
        ),
    ],
)
def test_advice(sums, fit, said):
    assert advise(sums, fit) == said


@pytest.mark.parametrize(
    ("cause", "habits", "said"),
    [
        ("decode", Habits(1, "none"), "store the column in a cheaper type, or give the job more "),
        ("decode", Habits(2, "none"), "take fewer columns (columns=[…])"),
        ("decode", Habits(1, "full"), 'shuffle in blocks (shuffle="block")'),
        ("tier", Habits(1, "block"), "the local disk is the limit: have it on a faster tier"),
        ("open", Habits(1, "none"), "opening shards is the limit: make shards larger"),
        ("network", Habits(1, "none"), "the network is the limit: run a daemon on this node"),
        ("network", Habits(2, "none"), "the network is the limit: read fewer columns, or run a "),
    ],
)
def test_nothing_is_advised_that_does_not_apply(cause, habits, said):
    sums = Workload(10.0, {cause: 9.0}, 9.0, num_threads=2, num_cpus=2, habits=habits)
    found = advise(sums, FITS).partition("the step: ")[2]
    assert found == said or (said.endswith(" ") and found.startswith(said))
