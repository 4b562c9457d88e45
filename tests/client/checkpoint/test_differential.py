"""The same state through us and through torch's own files, into other ranks: bit for bit."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay_server.testing.daemon import DaemonProcess

DTYPES = [
    *("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64"),
    *("bool", "complex32", "complex64", "complex128", "uint16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
LAYOUTS = ["contiguous", "transposed", "gaps"]

MESHES = {
    1: [[1]],
    2: [[2], [1, 2]],
    3: [[3]],
    4: [[4], [2, 2], [4, 1]],
    5: [[5], [1, 5]],
    6: [[6], [2, 3], [3, 2]],
    7: [[7], [7, 1]],
    8: [[8], [2, 4], [4, 2]],
}

_numbers = itertools.count()


@st.composite
def tensors(draw: Any) -> list[dict[str, Any]]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        found.append(
            {
                "name": f"t{number}",
                "dtype": draw(st.sampled_from(DTYPES)),
                "shape": shape,
                "seed": draw(st.integers(0, 1000)),
            }
        )
    return found


@st.composite
def worlds(draw: Any, specs: list[dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """A mesh, and how each tensor lies on it."""
    size = draw(st.sampled_from(sizes))
    mesh = draw(st.sampled_from(MESHES[size]))
    how = []
    for spec in specs:
        dimensions = len(spec["shape"])
        choices = ["R", *(f"S{dimension}" for dimension in range(dimensions))]
        placements = [draw(st.sampled_from(choices)) for _ in mesh]
        # Sharded twice along one dimension is fine; torch wants an object to be sharded at all.
        is_plain = draw(st.booleans()) if size == 1 else False
        how.append(
            {
                "placements": None if is_plain else placements,
                "layout": draw(st.sampled_from(LAYOUTS)),
            }
        )
    return {"size": size, "mesh": mesh, "how": how}


@st.composite
def examples(draw: Any, sizes: list[int]) -> dict[str, Any]:
    specs = draw(tensors())
    return {
        "tensors": specs,
        "before": draw(worlds(specs, sizes)),
        "after": draw(worlds(specs, sizes)),
    }


def check(example: dict[str, Any], daemon: DaemonProcess, pool: Any, folder: Path) -> None:
    number = next(_numbers)
    address = daemon.address()["rpc"]
    common = {
        "run": f"differential-{folder.name}-{number}"[:120],
        "folder": str(folder / f"torch-{number}"),
        "tensors": example["tensors"],
    }
    for scenario, world in (("save_both", example["before"]), ("load_both", example["after"])):
        pool.run(scenario, world["size"], address, **common, mesh=world["mesh"], how=world["how"])


SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=3, deadline=None, suppress_health_check=SHARED)
@given(example=examples([1, 2, 3, 4]))
def test_we_and_torch_agree_on_up_to_four_ranks(
    example: dict[str, Any], daemon: DaemonProcess, pool: Any, tmp_path: Path
) -> None:
    check(example, daemon, pool, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=120, deadline=None, suppress_health_check=SHARED)
@given(example=examples([1, 2, 3, 4, 5, 6, 7, 8]))
def test_we_and_torch_agree_on_up_to_eight_ranks(
    example: dict[str, Any], daemon: DaemonProcess, pool: Any, tmp_path: Path
) -> None:
    check(example, daemon, pool, tmp_path)


def every_dtype(layout: str, shape: list[int]) -> list[dict[str, Any]]:
    return [
        {"name": f"{dtype}-{layout}", "dtype": dtype, "shape": shape, "seed": seed}
        for seed, dtype in enumerate(DTYPES)
    ]


def test_every_dtype_from_rows_to_columns_and_whole(
    daemon: DaemonProcess, pool: Any, tmp_path: Path
) -> None:
    specs = [
        *every_dtype("contiguous", [5, 7]),
        *every_dtype("transposed", [6, 4]),
        *({**spec, "name": f"{spec['name']}-0", "shape": []} for spec in every_dtype("gaps", [])),
        *(
            {**spec, "name": f"{spec['name']}-e", "shape": [0, 3]}
            for spec in every_dtype("gaps", [])
        ),
    ]

    def world(size: int, mesh: list[int], placements: list[str]) -> dict[str, Any]:
        how = [
            {
                "placements": placements if spec["shape"] else ["R"] * len(mesh),
                "layout": LAYOUTS[number % 3],
            }
            for number, spec in enumerate(specs)
        ]
        return {"size": size, "mesh": mesh, "how": how}

    before = world(2, [2], ["S0"])
    for after in (world(3, [3], ["S1"]), world(4, [2, 2], ["S1", "S0"]), world(1, [1], ["R"])):
        check({"tensors": specs, "before": before, "after": after}, daemon, pool, tmp_path)
