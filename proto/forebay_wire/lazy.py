"""Attributes computed at first use, safe to copy into a forked child at any moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Owner = TypeVar("Owner")
Value = TypeVar("Value")


class lazy(Generic[Owner, Value]):
    """``functools.cached_property`` without its lock.

    Until Python 3.12 that lock is one for all objects: forked while a thread holds it, a DataLoader
    worker would wait for ever. Without it two threads may both compute; the results must be equal.
    """

    def __init__(self, compute: Callable[[Owner], Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> lazy[Owner, Value]: ...

    @overload
    def __get__(self, instance: Owner, owner: type[Any]) -> Value: ...

    def __get__(self, instance: Owner | None, owner: type[Any]) -> lazy[Owner, Value] | Value:
        if instance is None:
            return self
        value = self._compute(instance)
        # The instance's own attribute is found first from now on.
        instance.__dict__[self._name] = value
        return value
