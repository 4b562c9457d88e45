"""Plans as loaders tell them without gRPC: the same few JSON objects on both byte endpoints."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Final

from forebay_server.model.loader_times import LoaderTimes
from forebay_server.serve.plans import OrderParameters, Plan, Plans
from forebay_wire.errors import InvalidRequest

PLAN_OPERATIONS: Final = frozenset({"plan", "position", "turns", "end_plan"})

_KINDS: Final[dict[str, type]] = {
    part.name: str if part.type == "str" else int for part in fields(OrderParameters)
}


async def answer_plan(
    plans: Plans, operation: str, body: dict[str, Any], *, uid: int, owner: str
) -> dict[str, Any]:
    """The answer to a plan *operation*; the plan is *owner*'s, as long as that is connected."""
    plan = _text(body, "plan")
    times = LoaderTimes.parse(body["times"]) if "times" in body else None
    if operation == "end_plan":
        if times is not None:
            plans.told(plan, times, uid=uid)
        return {"existed": plans.end(plan, uid=uid)}
    if operation == "turns":
        return _standing(
            plans, plans.add_turns(plan, _number(body, "page"), _turns(body.get("turns")), uid=uid)
        )
    epoch, position = _number(body, "epoch"), _number(body, "position")
    if operation == "position":
        made = plans.advance(plan, epoch, position, uid=uid)
        if times is not None:
            plans.told(plan, times, uid=uid)
        return _standing(plans, made)
    made = await plans.register(
        plan,
        _text(body, "loader"),
        None if "manifest" in body else _order(body.get("order")),
        epoch,
        position,
        uid=uid,
        owner=owner,
        manifest=_text(body, "manifest") if "manifest" in body else "",
        plan_bytes=_number(body, "plan_bytes") if "manifest" in body else 0,
    )
    if times is not None:
        plans.told(plan, times, uid=uid)
    return _standing(plans, made)


def _standing(plans: Plans, plan: Plan) -> dict[str, Any]:
    return {
        "plan": plan.name,
        "lease_seconds": plans.lease_seconds,
        "waits": asdict(plan.waits),
        "fit": {"plan_bytes": plan.num_bytes, "tiers": plans.capacities()},
    }


def _order(value: object) -> OrderParameters:
    if not isinstance(value, dict):
        raise InvalidRequest("a plan needs an object 'order'")
    unknown = sorted(value.keys() - _KINDS.keys())
    if unknown:
        raise InvalidRequest(f"an order has no parameter {unknown[0]!r}: upgrade the daemon")
    for name, found in value.items():
        if type(found) is not _KINDS[name]:
            raise InvalidRequest(f"order parameter {name!r}: {found!r} is of the wrong kind")
    return OrderParameters(**value)


def _turns(value: object) -> list[tuple[int, list[int]]]:
    found: list[Any] = value if isinstance(value, list) else [None]
    for turn in found:
        is_pair = isinstance(turn, list) and len(turn) == 2 and isinstance(turn[1], list)
        if not is_pair or any(type(number) is not int for number in (turn[0], *turn[1])):
            raise InvalidRequest("a plan needs a list 'turns' of [samples, [shard, ...]]")
    return [(turn[0], turn[1]) for turn in found]


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"a plan needs a text {key!r}")
    return value


def _number(body: dict[str, Any], key: str) -> int:
    value = body.get(key)
    if type(value) is not int:
        raise InvalidRequest(f"a plan needs a number {key!r}")
    return value
