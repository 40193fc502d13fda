"""The table of a key's states: the code makes each of its moves and no other, and the docs show it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from scope_agent.psk.exchange import control
from scope_agent.psk.messages import What, encode
from scope_agent.psk.pair import Pair
from scope_agent.psk.pair_values import ATTEMPT
from scope_agent.psk.parts import cut
from scope_agent.psk.slots import Keys, Record
from scope_agent.psk.states import OF_D, OF_E, IllegalMove, Move, Moves, Standing, State

from scope.model import Secret
from tests.unit.psk_duo import Duo, Side

ROOT = Path(__file__).parents[2]
MANAGERS = Secret(bytes(range(32)))
RESTING = {("D", State.IDLE), ("E", State.IDLE), ("E", State.AGREED)}
# What a side does by itself, hearing nothing.
ALONE = {Move.GIVE_UP, Move.REVERT, Move.LOSE}
Row = tuple[str, State, Move]


def _rows() -> set[Row]:
    return {(role, state, move) for role, table in _tables() for state in table for move in table[state]}


def _tables() -> tuple[tuple[str, Moves], ...]:
    return ("D", OF_D), ("E", OF_E)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[Row]:
    """The moves that were made."""
    rows: set[Row] = set()
    go = Standing.go

    def note(standing: Standing, move: Move) -> None:
        rows.add(("D" if standing._moves is OF_D else "E", standing.state, move))
        go(standing, move)

    monkeypatch.setattr(Standing, "go", note)
    return rows


def _pair(side: Side) -> Pair:
    assert side.room is not None
    return side.room._pairs[side.other.key]


def _hears(side: Side, what: What, keys: Keys) -> None:
    """The side is told a word by the other one."""
    word = encode(control(what, keys, by_decapsulator=side is side.duo.e))
    assert side.room is not None
    for part in cut(1, word):
        side.room.receive(side.other.key, part, side.duo.now)
    side.perform()


def _rotating(side: str, state: State, *, manager: Secret | None = None, stuck: bool = False) -> Duo:
    """A pair with a key, of which one side is in a state with the next. `stuck`: its device takes none."""
    duo = Duo(1, manager=manager)
    duo.start()
    duo.until(duo.is_agreed, within=300.0)
    of = getattr(duo, side)
    if stuck:
        of.program = lambda: None
    duo.d.rotate()
    duo.until(lambda: _pair(of)._state is state, within=200.0)
    return duo


def _next(side: Side) -> Keys:
    keys = _pair(side)._record.next
    assert keys is not None
    return keys


def _given_up() -> Duo:
    """D was not answered, and its key is left in its slot."""
    duo = _rotating("d", State.AGREED)
    duo.loss = 1.0
    duo.until(lambda: _pair(duo.d)._state is State.IDLE, within=2.0 * ATTEMPT)
    return duo


def _offering_again() -> Duo:
    duo = _given_up()
    duo.d.rotate()
    duo.run(0.1)
    assert _pair(duo.d)._state is State.OFFERED
    return duo


def _told(duo: Duo, side: str, what: What) -> None:
    of = getattr(duo, side)
    _hears(of, what, _next(of))
    duo.run(0.1)


def _is_left(duo: Duo) -> bool:
    return all(not side.disk.active and side.disk.current is None for side in duo.sides)


def _left() -> None:
    duo = Duo(1, manager=MANAGERS)
    duo.start()
    duo.until(duo.is_agreed, within=300.0)
    for side in duo.sides:
        side.leave()
    duo.until(functools.partial(_is_left, duo), within=900.0)


def _abandoned() -> None:
    duo = _rotating("e", State.AGREED, manager=MANAGERS)
    duo.d.crash()
    assert duo.e.room is not None
    duo.e.room.abandon(duo.d.key, duo.now)
    duo.e.perform()
    duo.run(30.0)
    assert _pair(duo.e)._state is State.IDLE


def _unheard() -> None:
    duo = _rotating("d", State.AGREED)
    duo.loss = 1.0
    duo.run(2.0 * ATTEMPT)


def _without_device(side: str) -> None:
    duo = _rotating(side, State.SET)
    getattr(duo, side).lose_device()
    duo.run(1.0)


def _replaced() -> None:
    """E waits with a key that D gave up for another one."""
    duo = _given_up()
    duo.loss = 0.0
    duo.run(100.0)
    duo.d.rotate()
    duo.run(30.0)


def _never_young() -> None:
    duo = _rotating("d", State.READY)
    duo.session = duo.now - 100.0
    duo.keepalive = (False, False)
    duo.d.look()
    duo.e.crash()
    duo.run(500.0)


def _offer_lost() -> None:
    duo = _rotating("d", State.OFFERED)
    duo.loss = 1.0
    duo.run(2.0 * ATTEMPT)


def _whole() -> None:
    duo = _rotating("d", State.SET)
    duo.until(functools.partial(duo.is_agreed, 2), within=200.0)


SCENES: tuple[Callable[[], object], ...] = (
    _whole,
    _left,
    _abandoned,
    _unheard,
    _replaced,
    _never_young,
    _offer_lost,
    lambda: _without_device("d"),
    lambda: _without_device("e"),
    lambda: _told(_given_up(), "d", What.CONFIRM),
    lambda: _told(_given_up(), "d", What.ACTIVE),
    lambda: _told(_offering_again(), "d", What.CONFIRM),
    lambda: _told(_offering_again(), "d", What.ACTIVE),
    lambda: _told(_rotating("d", State.AGREED), "d", What.CONFIRM),
    lambda: _told(_rotating("d", State.AGREED), "d", What.ACTIVE),
    lambda: _told(_rotating("d", State.READY), "d", What.CONFIRM),
    lambda: _told(_rotating("d", State.LAID, stuck=True), "d", What.REVERTED),
    lambda: _told(_rotating("d", State.LAID, stuck=True), "d", What.CONFIRM),
    lambda: _told(_rotating("d", State.SET), "d", What.REVERTED),
    lambda: _told(_rotating("e", State.AGREED), "e", What.CONFIRM),
    lambda: _told(_rotating("e", State.LAID, stuck=True), "e", What.ABORT),
    lambda: _told(_rotating("e", State.LAID, stuck=True), "e", What.CONFIRM),
    lambda: _told(_rotating("e", State.SET), "e", What.ABORT),
)


def test_the_code_makes_every_move_of_the_table_and_no_other(made: set[Row]) -> None:
    for scene in SCENES:
        scene()
    assert _rows() - made == set()
    assert made - _rows() == set()


def test_a_move_that_the_table_does_not_have_changes_nothing() -> None:
    for role, table in _tables():
        for state in table:
            for move in set(Move) - table[state].keys():
                standing = Standing(Record(), is_decapsulator=role == "D")
                standing.state = state
                with pytest.raises(IllegalMove, match=f"{move.name} from {state.name}"):
                    standing.go(move)
                assert standing.state is state


def test_every_state_is_reached_and_a_side_that_hears_nothing_comes_to_rest_from_each() -> None:
    for role, table in _tables():
        assert _reached(table, State.IDLE, set(Move)) == table.keys()
        for state in table:
            assert any((role, each) in RESTING for each in _reached(table, state, ALONE))


def _reached(table: Moves, start: State, by: set[Move]) -> set[State]:
    found, waiting = {start}, [start]
    while waiting:
        following = {state for move, state in table[waiting.pop()].items() if move in by} - found
        found |= following
        waiting += following
    return found


def test_the_docs_show_the_table_as_it_is() -> None:
    text = (ROOT / "docs" / "post-quantum.md").read_text()
    shown = text.partition("<!-- states of psk/states.py -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == _as_table()


def _as_table() -> str:
    """What belongs between the two marks in the docs."""
    lines = ["| state | | D: move to | E: move to |", "|---|---|---|---|"]
    for state in State:
        cells = [", ".join(_moves(table.get(state, {}))) or "-" for _, table in _tables()]
        lines.append(f"| `{state.name}` | {state.value} | {cells[0]} | {cells[1]} |")
    lines += ["", "| move | |", "|---|---|", *(f"| {move.name} | {move.value} |" for move in Move)]
    return "\n".join(lines)


def _moves(moves: Mapping[Move, State]) -> list[str]:
    return [f"{move.name} `{state.name}`" for move, state in moves.items()]
