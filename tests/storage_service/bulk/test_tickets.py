"""Tokens and tickets open what they say, until they are over."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.bulk.tickets import TICKET_SECONDS, Auth
from forebay_wire.errors import PermissionDenied, Unauthenticated

BLOB = "ab" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def test_a_token_names_its_user_also_after_a_restart() -> None:
    token = Auth(b"k" * 32, "node").token(1000)
    assert Auth(b"k" * 32, "node").check_token(token) == 1000


@pytest.mark.parametrize(
    "token",
    [
        "",
        "v1",
        "v1.1000.",
        "v1..abc",
        "v2.1000.00",
        "v1.1000." + "0" * 64,
        "v1.\uff11.x",
        "\udcff.é",
        Auth(b"o" * 32, "node").token(1000),
        Auth(b"k" * 32, "node").token(1000).replace("1000", "0"),
    ],
)
def test_other_tokens_are_refused(token: str) -> None:
    with pytest.raises(Unauthenticated):
        Auth(b"k" * 32, "node").check_token(token)


def test_a_ticket_says_what_it_opens() -> None:
    auth = Auth(b"k" * 32, "node", Clock())
    ticket = auth.check_ticket(
        auth.ticket("GET", uid=5, blob=BLOB, client="me", start=10, stop=20), "GET"
    )
    assert (ticket.uid, ticket.client, ticket.blob, ticket.session) == (5, "me", BLOB, None)
    assert (ticket.start, ticket.stop) == (10, 20)


def test_a_ticket_ends() -> None:
    clock = Clock()
    auth = Auth(b"k" * 32, "node", clock)
    text = auth.ticket("GET", uid=5, blob=BLOB, stop=20)
    clock.now += TICKET_SECONDS - 1
    auth.check_ticket(text, "GET")
    clock.now += 2
    with pytest.raises(Unauthenticated, match="over"):
        auth.check_ticket(text, "GET")


def test_a_ticket_is_for_one_method_and_one_node() -> None:
    auth = Auth(b"k" * 32, "node")
    text = auth.ticket("GET", uid=5, blob=BLOB, stop=20)
    with pytest.raises(PermissionDenied):
        auth.check_ticket(text, "PUT")
    with pytest.raises(Unauthenticated, match="node"):
        Auth(b"k" * 32, "another").check_ticket(text, "GET")


def test_a_changed_ticket_is_refused() -> None:
    auth = Auth(b"k" * 32, "node")
    payload, _, signature = auth.ticket("GET", uid=5, blob=BLOB, stop=20).partition(".")
    body = json.loads(base64.urlsafe_b64decode(payload + "=="))
    body["r"] = [0, 1 << 40]
    forged = base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")
    with pytest.raises(Unauthenticated):
        auth.check_ticket(f"{forged}.{signature}", "GET")


@given(st.text())
def test_no_text_is_a_ticket_by_chance(text: str) -> None:
    with pytest.raises(Unauthenticated):
        Auth(b"k" * 32, "node").check_ticket(text, "GET")
