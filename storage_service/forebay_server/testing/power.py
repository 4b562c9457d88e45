"""What a power loss may leave: recorded file operations, replayed without their unsynced tail.

:func:`record` is the prefix of a command that records it with strace. :func:`parse` reads the
record and :class:`Replay` makes the folder as a disk may hold it after a power loss at any moment.
The model is the strict one of POSIX (T. Pillai et al., "All File Systems Are Not Created Equal",
OSDI 2014, section 3): a write is safe once an fsync of that file that began after it has ended, a
name once an fsync of its folder has; whatever is not safe may be there, be missing or be there in
part, in any combination.
"""

from __future__ import annotations

import random
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

PAGE_BYTES: Final = 4096
MAX_WRITE_BYTES: Final = 1 << 24
"""Of one call; the tier writes smaller pieces."""

_TRACED: Final = (
    "open,openat,creat,close,dup,dup2,dup3,fcntl,"
    "write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,"
    "fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir"
)


def record(target: Path) -> list[str]:
    """The words to put before a command so that its file operations are recorded in *target*.

    The command stays the direct child; the record ends with a line "+++ exited" or "+++ killed".
    """
    return [
        *("strace", "-D", "-f", "--seccomp-bpf", "-ttt", "-T", "-xx", "-s", str(MAX_WRITE_BYTES)),
        *("-e", f"trace={_TRACED}", "-o", str(target)),
    ]


@dataclass(frozen=True)
class Call:
    """One system call that succeeded."""

    start: float
    """Unix seconds."""
    end: float
    name: str
    arguments: str
    result: int


_LINE: Final = re.compile(r"^(\d+)\s+(\d+\.\d+)\s+(.*)$", re.DOTALL)
_UNFINISHED: Final = " <unfinished ...>"
_RESUMED: Final = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_DONE: Final = re.compile(
    r"^(\w+)\((.*)\)\s+= (-?\d+|0x[0-9a-f]+)(?: .*)? <(\d+\.\d+)>$", re.DOTALL
)
_TEXT: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def parse(recorded: Path) -> list[Call]:
    """The calls of a record that succeeded, in the order in which they ended."""
    calls = []
    pending: dict[str, tuple[float, str]] = {}
    for line in recorded.read_text(encoding="ascii").splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        process, moment, rest = found[1], float(found[2]), found[3]
        if rest.endswith(_UNFINISHED):
            pending[process] = (moment, rest.removesuffix(_UNFINISHED))
            continue
        resumed = _RESUMED.match(rest)
        if resumed is not None:
            moment, begun = pending.pop(process)
            rest = begun + resumed[2]
        done = _DONE.match(rest)
        if done is None or done[3].startswith("-"):
            continue
        calls.append(Call(moment, moment + float(done[4]), done[1], done[2], int(done[3], 0)))
    return sorted(calls, key=lambda call: call.end)


def _texts(arguments: str) -> list[bytes]:
    """The strings among a call's arguments: paths, and the bytes that were written."""
    return [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]


def _words(arguments: str) -> list[str]:
    """The arguments, strings left out."""
    return [word.strip() for word in _TEXT.sub('""', arguments).split(",")]


Kind = Literal["write", "size", "grow"]


@dataclass(frozen=True)
class _Change:
    """One change of a file's bytes."""

    end: float
    kind: Kind
    offset: int
    data: bytes = b""

    def apply(self, content: bytearray) -> None:
        if self.kind == "size":
            del content[self.offset :]
        last = self.offset + len(self.data)
        if len(content) < last:
            content.extend(bytes(last - len(content)))
        if self.kind == "write":
            content[self.offset : last] = self.data

    def torn(self, rng: random.Random) -> _Change | None:
        """As much of it as a disk may have taken: all, nothing, or some first pages."""
        chance = rng.random()
        if chance < 0.4:
            return self
        if chance < 0.8 or self.kind != "write":
            return None
        pages = range(PAGE_BYTES - self.offset % PAGE_BYTES, len(self.data), PAGE_BYTES)
        return _Change(self.end, "write", self.offset, self.data[: rng.choice(pages or [0])])


@dataclass
class _File:
    """One inode: what is safe, and what has happened since."""

    safe: bytearray = field(default_factory=bytearray)
    pending: list[_Change] = field(default_factory=list)
    size: int = 0

    def change(self, change: _Change) -> None:
        self.pending.append(change)
        last = change.offset + len(change.data)
        self.size = change.offset if change.kind == "size" else max(self.size, last)

    def sync(self, begun: float) -> None:
        """An fsync that began at *begun* has ended."""
        covered = bisect_right(self.pending, begun, key=lambda change: change.end)
        for change in self.pending[:covered]:
            change.apply(self.safe)
        del self.pending[:covered]

    def after(self, how: How, rng: random.Random) -> bytearray:
        content = bytearray(self.safe)
        for change in self.pending:
            kept = change if how == "all" else change.torn(rng) if how == "some" else None
            if kept is not None:
                kept.apply(content)
        return content


How = Literal["none", "some", "all"]
"""How much of what was not synced the disk has taken."""


@dataclass(frozen=True)
class _Entry:
    """One change of a folder: *name* leads to *target* now, or to nothing."""

    end: float
    name: Path
    target: _File | None
    old: Path | None = None
    """The name that went in the same step, of a rename."""


_FOLDER: Final = _File()
"""Stands for every folder: only its name matters."""


class Replay:
    """The files below *root*, step by step. They began as nothing."""

    def __init__(self, root: Path, calls: Sequence[Call]) -> None:
        self._root = root
        self._calls = calls
        self._next = 0
        self._names: dict[Path, _File] = {}
        self._safe: dict[Path, _File] = {}
        self._entries: list[_Entry] = []
        self._open: dict[int, tuple[_File, Path]] = {}
        self._offsets: dict[int, int] = {}
        self.now = 0.0
        """When the last call ended."""

    def steps(self) -> Iterator[Call]:
        """Go through the calls; yields each that changed something below the root, or synced it."""
        for call in self._calls:
            if self._apply(call):
                self.now = call.end
                yield call

    def write_to(self, target: Path, how: How, seed: int = 0) -> None:
        """Make *target* the root as it may be after a power loss now."""
        rng = random.Random(seed)
        names = dict(self._safe)
        for entry in self._entries:
            if how == "all" or (how == "some" and rng.random() < 0.5):
                _enter(names, entry)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name, file in sorted(names.items(), key=lambda item: item[0]):
            place = target / name.relative_to(self._root)
            if name != self._root and not place.parent.is_dir():
                continue  # its folder's own name was lost
            if file is _FOLDER:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(file.after(how, rng))

    # ------------------------------------------------------------------------------ one call

    def _apply(self, call: Call) -> bool:
        if call.name in ("open", "openat", "creat"):
            return self._do_open(call)
        if call.name in ("dup", "dup2", "dup3", "fcntl"):
            return self._do_dup(call)
        if call.name in ("close", "fsync", "fdatasync", "ftruncate", "fallocate") or (
            "write" in call.name
        ):
            return self._do_descriptor(call)
        return self._do_names(call)

    def _do_open(self, call: Call) -> bool:
        (path,) = self._paths(call.arguments)
        self._open.pop(call.result, None)
        if not path.is_relative_to(self._root):
            return False
        file, changed = self._names.get(path), False
        if file is None:
            if "O_CREAT" not in call.arguments and call.name != "creat":
                return False
            file, changed = _File(), True
            self._enter(_Entry(call.end, path, file))
        elif "O_TRUNC" in call.arguments and file.size:
            file.change(_Change(call.end, "size", 0))
            changed = True
        self._open[call.result] = (file, path)
        self._offsets[call.result] = 0
        if "O_APPEND" in call.arguments:
            self._offsets[call.result] = -1
        return changed

    def _do_dup(self, call: Call) -> bool:
        if call.name != "fcntl" or "F_DUPFD" in call.arguments:
            opened = self._open.get(int(_words(call.arguments)[0]))
            self._open.pop(call.result, None)
            if opened is not None:
                self._open[call.result] = opened
                self._offsets[call.result] = 0
        return False

    def _do_descriptor(self, call: Call) -> bool:
        words = _words(call.arguments)
        descriptor = int(words[0])
        if call.name == "close":
            self._open.pop(descriptor, None)
            return False
        if descriptor not in self._open:
            return False
        file, path = self._open[descriptor]
        if call.name in ("fsync", "fdatasync"):
            file.sync(call.start)
            if file is _FOLDER:
                self._sync_folder(path, call.start)
        elif call.name == "ftruncate":
            self._set_size(file, call.end, int(words[1]))
        elif call.name == "fallocate":
            last = int(words[2]) + int(words[3])
            if "KEEP_SIZE" not in words[1] and last > file.size:
                file.change(_Change(call.end, "grow", file.size, bytes(last - file.size)))
        else:
            self._write(call, descriptor, file, words)
        return True

    def _write(self, call: Call, descriptor: int, file: _File, words: list[str]) -> None:
        data = b"".join(_texts(call.arguments))[: call.result]
        if call.name in ("write", "writev"):
            offset = self._offsets[descriptor]
            offset = file.size if offset < 0 else offset
            if self._offsets[descriptor] >= 0:
                self._offsets[descriptor] = offset + len(data)
        else:
            offset = int(words[-2] if call.name == "pwritev2" else words[-1])
        file.change(_Change(call.end, "write", offset, data))

    def _do_names(self, call: Call) -> bool:
        paths = self._paths(call.arguments)
        if not any(path.is_relative_to(self._root) for path in paths):
            return False
        if call.name.startswith("mkdir"):
            self._enter(_Entry(call.end, paths[0], _FOLDER))
        elif call.name.startswith(("unlink", "rmdir")):
            self._enter(_Entry(call.end, paths[0], None))
        elif call.name.startswith("link"):
            self._enter(_Entry(call.end, paths[1], self._names[paths[0]]))
        elif call.name.startswith("rename"):
            self._enter(_Entry(call.end, paths[1], self._names[paths[0]], paths[0]))
        else:
            self._set_size(self._names[paths[0]], call.end, int(_words(call.arguments)[1]))
        return True

    @staticmethod
    def _set_size(file: _File, end: float, size: int) -> None:
        if size < file.size:
            file.change(_Change(end, "size", size))
        elif size > file.size:
            file.change(_Change(end, "grow", file.size, bytes(size - file.size)))

    def _paths(self, arguments: str) -> list[Path]:
        """The paths that a call names: absolute ones, or beside an open folder."""
        paths = []
        before = "AT_FDCWD"
        texts = iter(_texts(arguments))
        for word in _words(arguments):
            if word == '""':
                text = Path(next(texts).decode())
                opened = self._open.get(int(before)) if before.isdigit() else None
                paths.append(opened[1] / text if opened is not None else text)
            before = word
        return paths

    # ------------------------------------------------------------------------------- folders

    def _enter(self, entry: _Entry) -> None:
        _enter(self._names, entry)
        self._entries.append(entry)

    def _sync_folder(self, folder: Path, begun: float) -> None:
        """Entries of *folder* that were made before *begun* are safe."""
        rest = []
        for entry in self._entries:
            if entry.end <= begun and folder in {
                entry.name.parent,
                entry.old.parent if entry.old is not None else None,
            }:
                _enter(self._safe, entry)
            else:
                rest.append(entry)
        self._entries = rest


def _enter(names: dict[Path, _File], entry: _Entry) -> None:
    if entry.old is not None:
        names.pop(entry.old, None)
    if entry.target is None:
        names.pop(entry.name, None)
    else:
        names[entry.name] = entry.target
