"""`forebay checkpoint show|verify|diff|cat`: what is in generations, and what differs."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay.methods import Checkpoints
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.v1.checkpoints_pb2 import WaitGenerationRequest

ROWS = 700


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Linear(300, 300)
        self.head = torch.nn.Linear(ROWS, 300, bias=False)
        self.tied = self.head
        self.small = torch.nn.Parameter(torch.arange(12, dtype=torch.bfloat16).reshape(3, 4))
        self.register_buffer("count", torch.arange(10))


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    return []


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, torch.Tensor]]):
    """A run of three generations: the second moved a little, the third has a NaN."""
    torch.manual_seed(0)
    with DaemonProcess(tmp_path_factory.mktemp("inspect") / "data") as process:
        with forebay.connect(process.address()["rpc"]) as client:
            model = Net()
            with forebay.Checkpointer(client, "run", model=model) as checkpointer:
                for step in (1, 2, 3):
                    with torch.no_grad():
                        if step == 2:
                            model.head.weight.add_(torch.randn(300, ROWS) * 1e-3)
                        if step == 3:
                            model.frozen.bias[7] = math.nan
                    extra = torch.zeros(4 + step)
                    saved = checkpointer.save(step, state={"extra": extra, "note": step})
                    saved.wait("local", timeout=60)
                    states.append({k: v.clone() for k, v in model.state_dict().items()})
                advice = checkpointer.report(mtbf=3600.0).advice
                assert advice is not None
                assert 0 < advice.cost_seconds < advice.interval_seconds < 3600
                assert checkpointer.report().advice is None
        yield process


@pytest.fixture
def data(process: DaemonProcess) -> Path:
    return process.data


def test_diff_without_reading(forebay_command, data: Path, states) -> None:
    ended = forebay_command("checkpoint", "diff", "run@1", "run@2", "--data", data, "--json")
    assert ended.status == ExitCode.FAILURE
    found = {one["name"]: one for one in ended.json["tensors"]}
    head = found["model.head.weight"]
    before, after = states[0]["head.weight"], states[1]["head.weight"]
    true = float((after - before).norm() / before.norm())
    assert head["status"] == "changed"
    assert not head["is_exact"]
    assert head["relative_change"] == pytest.approx(true, rel=0.35)
    assert head["a"]["norm"] == pytest.approx(float(before.double().norm()), rel=1e-9)
    for name in ("model.frozen.weight", "model.frozen.bias", "model.small", "model.count"):
        assert (found[name]["status"], found[name]["relative_change"]) == ("unchanged", 0.0)
    assert found["state.extra"]["status"] == "other shape"
    assert ended.json["objects"] == {"state.note": "changed"}
    first = ended.json["tensors"][0]["name"], ended.json["tensors"][1]["name"]
    assert first == ("state.extra", "model.head.weight")


def test_diff_of_a_generation_with_itself(forebay_command, data: Path) -> None:
    ended = forebay_command("checkpoint", "diff", "run@1", "run@1/1", "--data", data, "--json")
    assert ended.status == ExitCode.OK
    assert ended.json["is_equal"]


def test_tags_name_generations(forebay_command, data: Path) -> None:
    with forebay.connect(data) as client:
        client.run("run").tag("good", "1/2")
    arguments = ("checkpoint", "diff", "run@good", "run@2", "--data", data, "--json")
    assert forebay_command(*arguments).json["a"] == "run@1/2"
    shown = forebay_command("checkpoint", "show", "run", "good", "--data", data)
    assert "good" in shown.out
    assert "run@1/2" in shown.out


def test_exact_diff_reads(forebay_command, data: Path, states) -> None:
    arguments = ("checkpoint", "diff", "run@1", "run@2", "--exact", "--data", data, "--json")
    found = {one["name"]: one for one in forebay_command(*arguments).json["tensors"]}
    before, after = states[0]["head.weight"].double(), states[1]["head.weight"].double()
    head = found["model.head.weight"]
    assert head["is_exact"]
    assert head["relative_change"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert head["max_abs"] == pytest.approx(float((after - before).abs().max()), rel=1e-12)
    assert found["model.small"]["status"] == "unchanged"


@pytest.mark.parametrize("exact", [(), ("--exact",)])
def test_nan_that_came(forebay_command, data: Path, exact: tuple[str, ...]) -> None:
    shown = forebay_command("checkpoint", "diff", "run@2", "run", *exact, "--data", data)
    [line] = [line for line in shown.out.splitlines() if "model.frozen.bias" in line]
    assert "1 NaN" in line
    assert "inf" in line


def test_show_has_a_tree_and_warns_of_nan(forebay_command, data: Path) -> None:
    shown = forebay_command("checkpoint", "show", "run", "--fingerprints", "--data", data)
    assert "Beware: model.frozen.bias has 1 NaN" in shown.out
    arguments = ("checkpoint", "show", "run@1/1", "--depth", "2", "--data", data, "--json")
    found = forebay_command(*arguments).json
    modules = {one["name"]: one for one in found["modules"]}
    frozen = modules["model.frozen"]
    assert (frozen["level"], frozen["num_tensors"], frozen["num_bytes"]) == (1, 2, 300 * 301 * 4)
    assert "model.frozen.weight" not in modules
    names = [one["name"] for one in found["tensors"]]
    assert modules["model"]["num_tensors"] == sum(one.startswith("model.") for one in names)
    assert forebay_command(*arguments[:-3], "--depth", 0, *arguments[-3:]).json["modules"] == []


def test_advice_goes_by_what_saves_cost(forebay_command, data: Path) -> None:
    arguments = ("checkpoint", "advise", "run", "--mtbf", "6h", "--step-seconds", 0.5)
    found = forebay_command(*arguments, "--data", data, "--json").json
    shown = forebay_command("checkpoint", "show", "run@2", "--data", data, "--json").json
    assert 0 < shown["stall_seconds"] < 60
    assert found["num_saves"] == 3
    assert 0 < found["cost_seconds"] < 60
    expected = (2 * found["cost_seconds"] * 6 * 3600) ** 0.5
    assert found["interval_seconds"] == pytest.approx(expected, rel=0.2)
    assert found["interval_steps"] == round(found["interval_seconds"] / 0.5)
    given = forebay_command(*arguments, "--cost", "2s", "--data", data)
    assert "2.000 s (given)" in given.out
    assert "4.9 min (Daly)" in given.out


def test_verify_of_what_is_good(forebay_command, data: Path) -> None:
    ended = forebay_command("checkpoint", "verify", "run@1", "--data", data, "--json")
    assert ended.status == ExitCode.OK
    assert ended.json["damaged"] == []
    assert ended.json["num_bytes"] > 300 * ROWS * 4


def test_cat_prints_what_was_saved(forebay_command, data: Path, states, tmp_path: Path) -> None:
    def values(text: str) -> np.ndarray:
        arguments = ("checkpoint", "cat", "run@2", text, "--data", data, "--json")
        found = forebay_command(*arguments).json
        return np.array(found["values"]).reshape(found["values_shape"])

    head = states[1]["head.weight"].numpy()
    assert (values("model.head.weight[2:7, ::100]") == head[2:7, ::100]).all()
    assert (values("model.head.weight[-1, 3]") == head[-1, 3]).all()
    assert (values("model.head.weight[10:0:-3, 5]") == head[10:0:-3, 5]).all()
    assert values("model.head.weight[5:5]").shape == (0, ROWS)
    assert values("model.small").tolist() == np.arange(12.0).reshape(3, 4).tolist()
    assert values("model.count").tolist() == list(range(10))
    file = tmp_path / "head.npy"
    arguments = ("checkpoint", "cat", "run@2", "model.head.weight", "--output", file)
    assert forebay_command(*arguments, "--data", data).status == ExitCode.OK
    assert (np.load(file) == head).all()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("tensor", "status", "message"),
    [
        ("model.head.weigth", ExitCode.NOT_FOUND, "model.head.weight"),
        ("model.head.weight[1,2,3]", ExitCode.USAGE, "dimensions"),
        ("model.head.weight[300]", ExitCode.USAGE, "300 long"),
        ("model.head.weight[a]", ExitCode.USAGE, "a slice is"),
    ],
)
def test_cat_says_what_is_wrong(
    forebay_command, data: Path, tensor: str, status: int, message: str
) -> None:
    ended = forebay_command("checkpoint", "cat", "run", tensor, "--data", data)
    assert ended.status == status
    assert message in ended.err


def test_commands_that_read_no_values_need_no_torch(data: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from forebay.cli import main\n"
        "for words in (['show', 'run'], ['diff', 'run@1', 'run@2'], ['verify', 'run'],\n"
        "              ['cat', 'run', 'model.small'], ['diff', 'run@1', 'run@2', '--exact'],\n"
        "              ['list', 'run']):\n"
        "    try: main(['checkpoint', *words, '--data', sys.argv[1]])\n"
        "    except SystemExit as ended: print('status', words[0], ended.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ended = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert ended == [
        *("status show 0", "status diff 1", "status verify 0", "status cat 0"),
        *("status diff 1", "status list 0"),
    ]


def test_verify_names_the_tensors_that_damage_has_hit(forebay_command, data: Path, states) -> None:
    """The last one: the only copy that is left is damaged."""
    with forebay.connect(data) as client:
        request = WaitGenerationRequest(
            run="run", attempt=1, step=1, durability="remote", timeout_seconds=60
        )
        client.channel.call(Checkpoints.WaitGeneration, request, timeout=70)
    for file in (data / "object" / "data").iterdir():
        file.unlink()
    needle = states[0]["head.weight"].numpy().tobytes()[:64]
    [file] = [
        file
        for file in (data / "ssd" / "files").rglob("*")
        if file.is_file() and needle in file.read_bytes()
    ]
    at = file.read_bytes().index(needle) + 5
    with file.open("r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)[0]
        raw.seek(at)
        raw.write(bytes([byte ^ 1]))
    ended = forebay_command("checkpoint", "verify", "run@1", "--data", data, "--json")
    assert ended.status == ExitCode.DAMAGED
    assert ended.json["damaged_tensors"] == ["model.head.weight", "model.tied.weight"]
    [damaged] = ended.json["damaged"]
    assert (damaged["rank"], damaged["tensors"]) == (0, ["model.head.weight", "model.tied.weight"])
    shown = forebay_command("checkpoint", "verify", "run@1", "--data", data)
    assert "7 of 7 tensors are damaged" in shown.out  # the copy is out of service by now
    assert "has no good copy left: segments" in shown.out
