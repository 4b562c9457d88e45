"""The operations page names every setting, metric, call and command there is."""

import re
from pathlib import Path

import click
import pytest

from forebay.cli import commands
from forebay_server.config import OPTIONS
from forebay_server.observe.metrics import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
RPC = re.compile(r"rpc (\w+)\(")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_setting_is_described_with_its_meaning(name: str) -> None:
    assert f"| `{name}` |" in PAGE
    assert OPTIONS[name].meaning in PAGE


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_described_with_its_meaning(name: str) -> None:
    assert f"| `{name}` | {METRICS[name].kind} |" in PAGE
    assert METRICS[name].meaning in PAGE


@pytest.mark.parametrize("proto", sorted((ROOT / "proto/forebay_wire/v1").glob("*.proto")))
def test_every_call_is_named(proto: Path) -> None:
    calls = RPC.findall(proto.read_text(encoding="utf-8"))
    assert calls
    assert [call for call in calls if f"`{call}`" not in PAGE] == []


def _leaves(command: click.Command, path: str) -> list[str]:
    if isinstance(command, click.Group):
        return [
            leaf
            for name, sub in command.commands.items()
            for leaf in _leaves(sub, f"{path} {name}")
        ]
    return [path]


def test_every_command_is_named() -> None:
    leaves = _leaves(commands, "forebay")
    assert len(leaves) > 5
    assert [leaf for leaf in leaves if f"`{leaf}" not in PAGE] == []
