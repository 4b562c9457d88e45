"""Names and ids are checked once, at the border."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import (
    GenerationId,
    check_id,
    check_name,
    check_random_name,
    new_random_name,
)


@pytest.mark.parametrize("name", ["a", "0", "mnist-cnn", "A.b_c-9", "x" * 128])
def test_plain_names_are_allowed(name):
    assert check_name("run", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "a\x00", "x" * 129, None, 7]
)
def test_names_that_could_mean_something_else_are_refused(name):
    with pytest.raises(InvalidRequest, match="run name"):
        check_name("run", name)


def test_an_id_is_64_lower_case_hex_digits():
    assert check_id("blob", "0f" * 32)
    for text in ("", "0f" * 31, "0F" * 32, "0g" * 32, "0f" * 32 + "\n"):
        with pytest.raises(InvalidRequest, match="blob id"):
            check_id("blob", text)


def test_random_names_are_checked_and_never_repeat():
    names = {new_random_name() for _ in range(1000)}
    assert len(names) == 1000
    assert all(check_random_name("session", name) for name in names)
    with pytest.raises(InvalidRequest, match="session"):
        check_random_name("session", "../../etc/passwd")


@given(st.integers(0, 10**6), st.integers(0, 10**15))
def test_a_generation_id_comes_back_from_its_text(attempt, step):
    generation = GenerationId("my-run", attempt, step)
    assert GenerationId.parse(str(generation)) == generation


@pytest.mark.parametrize("text", ["", "run", "run@1", "run@1/x", "@1/2", "a@b@1/2", "run@1/2/3"])
def test_other_texts_are_no_generation(text):
    with pytest.raises(InvalidRequest):
        GenerationId.parse(text)
