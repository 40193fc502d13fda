"""One object of a document under inspection: what is asked of it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from scope.resources.limits import MAX_PROBLEMS, SHOWN_VALUE
from scope.resources.problems import InvalidResource, Problem, Refused, guess, show

T = TypeVar("T")


class Fields:
    """One object of a document. What is asked of it is what it may hold; problems land in one shared list."""

    def __init__(
        self, values: Mapping[object, object], *, path: str, problems: list[Problem], parts: list[Fields]
    ) -> None:
        self.values = values
        self.path = path
        self.problems = problems
        self.expected: set[str] = set()
        self.ignored: frozenset[str] = frozenset()
        self.inspected = parts
        self.ignore_unknown = False
        parts.append(self)

    @classmethod
    def of(cls, document: object, *, path: str = "", ignore_unknown: bool) -> Fields:
        """The outermost object of a document."""
        problems: list[Problem] = []
        if not isinstance(document, Mapping):
            problems.append(Problem(path or "document", f"{show(document)} is not allowed", "an object"))
            raise InvalidResource(problems)
        fields = cls(document, path=path, problems=problems, parts=[])
        fields.ignore_unknown = ignore_unknown
        return fields

    def present(self) -> set[str]:
        """Names of the fields that have a value."""
        return {name for name, value in self.values.items() if isinstance(name, str) and value is not None}

    def is_mapping(self, name: str) -> bool:
        """Whether the field holds an object."""
        return isinstance(self.values.get(name), Mapping)

    def optional(self, name: str, read: Callable[[object], T], default: T) -> T:
        """The field's value, or the default when it is absent (or refused, which is noted)."""
        self.expected.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        return self._read(name, value, read, default)

    def required(self, name: str, read: Callable[[object], T], stand_in: T) -> T:
        """The field's value; a missing one is noted, and the stand-in never leaves this package."""
        if self.values.get(name) is None:
            self.expected.add(name)
            self.problems.append(Problem(self._at(name), "missing", _allowed_by(read)))
            return stand_in
        return self.optional(name, read, stand_in)

    def items(self, name: str, read: Callable[[object], T], *, limit: int) -> tuple[T, ...]:
        """The values of a list field."""
        values = self._list(name, limit)
        found = [self._read(f"{name}[{i}]", value, read, None) for i, value in enumerate(values)]
        return tuple(value for value in found if value is not None)

    def parts(self, name: str, read: Callable[[Fields], T], *, limit: int) -> tuple[T, ...]:
        """The objects of a list field."""
        values = self._list(name, limit)
        return tuple(read(self._child(f"{self._at(name)}[{i}]", value)) for i, value in enumerate(values))

    def sub(self, name: str, *, required: bool = False) -> Fields:
        """The object in a field; an empty one where it is absent."""
        self.expected.add(name)
        value = self.values.get(name)
        if value is None and required:
            self.problems.append(Problem(self._at(name), "missing", "an object"))
        return self._child(self._at(name), {} if value is None else value, silent=value is None and required)

    def sub_if_any(self, name: str) -> Fields | None:
        """The object in a field; None where it is absent."""
        self.expected.add(name)
        return self.sub(name) if name in self.present() else None

    def refused(self, *names: str) -> bool:
        """Whether one of the fields has a problem already."""
        return any(problem.path == self._at(name) for problem in self.problems for name in names)

    def refuse(self, found: str, allowed: str, hint: str = "", *, at: str = "") -> None:
        """Note a problem of this object, or of its field `at`."""
        self.problems.append(Problem(self._at(at) if at else self.path, found, allowed, hint))

    def done(self) -> None:
        """Raise InvalidResource when anything was noted or, unless they are ignored, a field is unknown."""
        if not self.ignore_unknown:
            for fields in self.inspected:
                fields._note_unknown()
        if self.problems:
            raise InvalidResource(self.problems)

    def _note_unknown(self) -> None:
        known = sorted(self.expected)
        for name in self.values:
            if name in self.expected or name in self.ignored or len(self.problems) > 2 * MAX_PROBLEMS:
                continue
            shown = name if isinstance(name, str) and name.isprintable() else show(name)
            allowed = ", ".join(known)
            self.problems.append(
                Problem(self._at(shown[:SHOWN_VALUE]), "unknown field", allowed, guess(name, known))
            )

    def _read(self, name: str, value: object, read: Callable[[object], T], default: T) -> T:
        try:
            return read(value)
        except Refused as refused:
            self.problems.append(Problem(self._at(name), refused.found, refused.allowed, refused.hint))
            return default

    def _list(self, name: str, limit: int) -> Sequence[object]:
        self.expected.add(name)
        values = self.values.get(name)
        if values is None:
            return ()
        if not isinstance(values, list | tuple):
            self.refuse(f"{show(values)} is not allowed", "a list", at=name)
            return ()
        if len(values) > limit:
            self.refuse(f"{len(values)} items", f"at most {limit}", at=name)
            return ()
        return values

    def _child(self, path: str, value: object, *, silent: bool = False) -> Fields:
        if isinstance(value, Mapping):
            problems = [] if silent else self.problems
            return Fields(value, path=path, problems=problems, parts=self.inspected)
        self.problems.append(Problem(path, f"{show(value)} is not allowed", "an object"))
        return Fields({}, path=path, problems=[], parts=self.inspected)

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _allowed_by(read: Callable[[object], object]) -> str:
    """What a reader would have taken: it says so when it refuses."""
    try:
        read(None)
    except Refused as refused:
        return refused.allowed
    raise AssertionError("no reader takes null")


def each_once(fields: Fields, name: str, values: tuple[T, ...], *, key: Callable[[T], str]) -> tuple[T, ...]:
    """The values of a list that is a map by `key`, as Kubernetes reads it."""
    seen: set[str] = set()
    for i, value in enumerate(values):
        if key(value) and key(value) in seen:  # an empty one is a stand-in, and was refused
            fields.refuse(f"a second {show(key(value))}", "each one once", at=f"{name}[{i}]")
        seen.add(key(value))
    return values


def unless_empty(name: str, values: Sequence[object]) -> dict[str, object]:
    """The field of a list in a document, left out where it is empty."""
    return {name: [str(value) for value in values]} if values else {}
