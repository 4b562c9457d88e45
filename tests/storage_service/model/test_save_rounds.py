"""All ranks of a save are told the same, whoever comes when."""

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forebay_server.model.save_rounds import Ask, Ruling, SaveRounds, Verdict


def ask(structure: str = "a", plan: int = 0, step: int = 1, *, may_skip: bool = False) -> Ask:
    return Ask(step, structure, plan, may_skip)


def planned(num_ranks: int = 2) -> SaveRounds:
    """Rounds whose ranks have agreed on plan 1."""
    rounds = SaveRounds(num_ranks)
    for rank in range(num_ranks):
        rounds.ask(1, rank, ask())
    return rounds


def verdicts(rounds: SaveRounds, number: int, *asks: Ask, busy: bool = False) -> list[Verdict]:
    for rank, one in enumerate(asks):
        rounds.ask(number, rank, one, busy=busy)
    found = [rounds.ask(number, rank, one) for rank, one in enumerate(asks)]
    return [one.verdict for one in found if one is not None]


def test_the_first_save_is_planned_and_the_next_one_reuses_that() -> None:
    rounds = planned()
    assert rounds.ruling == Ruling(
        Verdict.REPLAN, 1, "a rank's state looks different, or is new here"
    )
    assert rounds.ask(2, 1, ask(plan=1)) is None
    assert rounds.ask(2, 0, ask(plan=1)) == Ruling(Verdict.REUSE, 1)


def test_one_rank_that_looks_different_has_all_plan() -> None:
    rounds = planned()
    assert verdicts(rounds, 2, ask("a", 1), ask("b", 1)) == [Verdict.REPLAN] * 2
    assert verdicts(rounds, 3, ask("a", 1), ask("a", 1)) == [Verdict.REPLAN] * 2  # not of plan 2
    assert verdicts(rounds, 4, ask("a", 3), ask("a", 3)) == [Verdict.REUSE] * 2


def test_a_rank_without_the_plan_has_all_plan() -> None:
    assert verdicts(planned(), 2, ask(plan=1), ask(plan=0)) == [Verdict.REPLAN] * 2


def test_a_restarted_daemon_has_all_plan() -> None:
    assert verdicts(SaveRounds(2), 7, ask(plan=6), ask(plan=6)) == [Verdict.REPLAN] * 2


def test_who_comes_too_late_plans_as_the_others_do() -> None:
    rounds = planned(3)
    rounds.ask(2, 0, ask(plan=1))
    rounds.ask(2, 2, ask(plan=1))
    given_up = rounds.give_up(2)
    assert given_up == Ruling(Verdict.REPLAN, 2, "rank 1 did not come in time")
    assert rounds.ask(2, 1, ask(plan=1)) == given_up
    assert verdicts(rounds, 3, *[ask(plan=2)] * 3) == [Verdict.REPLAN] * 3  # nobody knows rank 1's


def test_a_rank_that_cannot_save_stops_the_others_at_once_and_the_plan_stays() -> None:
    rounds = planned(3)
    assert rounds.ask(2, 0, ask(plan=1)) is None
    assert rounds.ask(2, 1, ask("")) == Ruling(Verdict.STOP, 0, "rank 1 cannot save")
    assert rounds.ask(2, 2, ask(plan=1)) == rounds.ruling
    assert verdicts(rounds, 3, *[ask(plan=1)] * 3) == [Verdict.REUSE] * 3


def test_different_steps_stop_all_at_once() -> None:
    rounds = planned(3)
    rounds.ask(2, 0, ask(plan=1, step=1))
    found = rounds.ask(2, 1, ask(plan=1, step=2))
    assert found == Ruling(Verdict.STOP, 0, "the ranks save different steps: [1, 2]")


def test_a_busy_save_is_skipped_only_if_all_ranks_want_that() -> None:
    assert (
        verdicts(planned(), 2, *[ask(plan=1, may_skip=True)] * 2, busy=True) == [Verdict.SKIP] * 2
    )
    mixed = ask(plan=1, may_skip=True), ask(plan=1)
    assert verdicts(planned(), 2, *mixed, busy=True) == [Verdict.REUSE] * 2


def test_a_rank_that_fell_behind_is_stopped() -> None:
    rounds = planned()
    rounds.ask(3, 0, ask(plan=1))
    found = rounds.ask(2, 1, ask(plan=1))
    assert found is not None
    assert found.verdict is Verdict.STOP
    assert rounds.give_up(2).verdict is Verdict.STOP


class Ranks(RuleBasedStateMachine):
    """Ranks come, repeat and lose patience in any order: in a round nobody is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = SaveRounds(3)
        self.told: dict[int, set[Ruling]] = {}
        self.asked: dict[tuple[int, int], Ask] = {}

    @rule(
        number=st.integers(1, 4),
        rank=st.integers(0, 2),
        one=st.builds(Ask, st.just(1), st.sampled_from(["", "a", "b"]), st.integers(0, 3)),
    )
    def ask(self, number: int, rank: int, one: Ask) -> None:
        one = self.asked.setdefault((number, rank), one)  # a repeat says the same again
        self._told(number, self.rounds.ask(number, rank, one))

    @rule(number=st.integers(1, 4))
    def give_up(self, number: int) -> None:
        if number <= self.rounds.number:
            self._told(number, self.rounds.give_up(number))

    def _told(self, number: int, ruling: Ruling | None) -> None:
        if ruling is not None and not (
            ruling.verdict is Verdict.STOP and "at save" in ruling.reason
        ):
            self.told.setdefault(number, set()).add(ruling)

    @invariant()
    def all_are_told_the_same(self) -> None:
        assert all(len(rulings) == 1 for rulings in self.told.values())

    @invariant()
    def reuse_means_that_all_hold_the_plan_of_their_structure(self) -> None:
        for number, (ruling,) in ((n, tuple(r)) for n, r in self.told.items()):
            if ruling.verdict is Verdict.REUSE:
                for rank in range(3):
                    now, then = self.asked[number, rank], self.asked[ruling.plan, rank]
                    assert (now.plan, now.structure) == (ruling.plan, then.structure)


TestRanks = Ranks.TestCase
