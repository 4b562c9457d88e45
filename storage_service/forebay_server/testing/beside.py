"""Modules in folders that are no packages, as those of tests are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_beside(file: str, name: str) -> ModuleType:
    """The module *name* that lies beside *file*; all who ask in this process get the same one."""
    path = Path(file).parent / f"{name}.py"
    known = f"beside_{path.parent.name}_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
