"""Showing the demo: a live view on a terminal, lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self, assert_never

from rich.align import Align
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from demo.frame import Cell, Event, Frame, Mood, Row, Show, Tally

# What eleven machines need; on a smaller terminal lines tell the same.
MIN_WIDTH, MIN_HEIGHT = 100, 28
_CELL_WIDTH = 6  # a name of five characters, and a space before it
_LINE_WIDTH = 110
_FRAMES_PER_SECOND = 8
_SEARCHING = ("·  ", "·· ", "···", " ··", "  ·", "   ")
MOOD_STYLES = {Mood.PLAIN: "default", Mood.GOOD: "green", Mood.BAD: "bold red"}
_SUPERSCRIPT = {"IPv4": "⁴", "IPv6": "⁶"}
_RELAYED_STYLE, _RELAYED_MARK = "magenta", "ʰ"
_ROUTED_STYLE, _ROUTED_MARK = "yellow", "ʳ"
_FAMILY_STYLE = {"IPv4": "cyan", "IPv6": "green"}


class Screen(Protocol):
    """What the story tells."""

    def show(self, frame: Frame) -> None:
        """Take what is to be seen from now on."""

    def tell(self, event: Event) -> None:
        """Say that something happened; it is in the next frame, too."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def choose_screen(console: Console, *, plain: bool) -> Screen:
    """The live view where the output is a terminal that it fits on, unless plain lines are wanted."""
    if not plain and console.is_terminal and console.width >= MIN_WIDTH and console.height >= MIN_HEIGHT:
        return Pictures(console)
    return Lines()


class Lines:
    """One line for each event."""

    def show(self, frame: Frame) -> None:
        """Nothing: what matters of a frame is told."""

    def tell(self, event: Event) -> None:
        print(f"{event.at:6.1f} s  {event.text}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        pass


class Pictures:
    """A view of the whole on the terminal's other screen, redrawn by a thread so that the clock runs on."""

    def __init__(self, console: Console) -> None:
        self._frame = Frame(time.monotonic(), 0, ())
        self._live = Live(
            console=console,
            screen=True,
            refresh_per_second=_FRAMES_PER_SECOND,
            get_renderable=lambda: picture(self._frame, now=time.monotonic()),
        )

    def show(self, frame: Frame) -> None:
        self._frame = frame

    def tell(self, event: Event) -> None:
        """Nothing: it is in the next frame."""

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._live.stop()


def picture(frame: Frame, *, now: float) -> RenderableType:
    """A frame as it is drawn at monotonic `now`."""
    layout = Layout()
    layout.split_column(
        Layout(_header(frame, now), name="header", size=3),
        Layout(Align.center(table(frame.rows, now=now)), name="table", size=len(frame.rows) + 3),
        Layout(name="below"),
    )
    layout["below"].split_row(
        Layout(_events(frame), name="events", ratio=3), Layout(_tally(frame), name="tally", size=38)
    )
    return layout


def table(rows: tuple[Row, ...], *, now: float) -> Table:
    """Who reaches whom: a row says how one machine reaches each other one."""
    grid = Table(box=None, padding=(0, 0, 0, 1), collapse_padding=True, pad_edge=False)
    grid.add_column("from", style="bold", header_style="dim", no_wrap=True, min_width=5)
    grid.add_column("", style="dim", no_wrap=True, min_width=33)
    for row in rows:
        grid.add_column(row.name, justify="right", width=_CELL_WIDTH, no_wrap=True, header_style="bold")
    for row in rows:
        grid.add_row(row.name, row.place, *(_drawn(cell, now) for cell in row.cells))
    return grid


def _drawn(cell: Cell, now: float) -> Text:
    match cell.show:
        case Show.SELF:
            return Text("▪", style="bright_black")
        case Show.AWAITED:
            return Text("·", style="bright_black")
        case Show.SEARCHING:
            return Text(_SEARCHING[int(now * _FRAMES_PER_SECOND) % len(_SEARCHING)], style="yellow")
        case Show.IMPOSSIBLE:
            return Text("—", style="bright_black")
        case Show.LOST:
            return Text("lost", style="bold red")
        case Show.DIRECT:
            family = cell.family or ""
            return _rtt(cell, _SUPERSCRIPT.get(family, " "), style=_FAMILY_STYLE.get(family, "default"))
        case Show.RELAYED:
            return _rtt(cell, _RELAYED_MARK, style=_RELAYED_STYLE)
        case Show.ROUTED:
            return _rtt(cell, _ROUTED_MARK, style=_ROUTED_STYLE)
    assert_never(cell.show)


def _rtt(cell: Cell, mark: str, *, style: str) -> Text:
    return Text(f"{rtt_text(cell.rtt_ms)}{mark}", style=style + (" bold reverse" if cell.fresh else ""))


def rtt_text(rtt_ms: float | None) -> str:
    """Milliseconds, with a decimal where it matters."""
    if rtt_ms is None:
        return "?"
    return f"{rtt_ms:.1f}" if rtt_ms < 9.95 else f"{rtt_ms:.0f}"


def _header(frame: Frame, now: float) -> RenderableType:
    title = Table.grid(expand=True)
    title.add_column()
    title.add_column(justify="right")
    title.add_row(
        Text.assemble((" Scope ", "bold reverse"), "  a WireGuard mesh through real NATs"),
        Text(f"{now - frame.started:5.1f} s ", style="bold"),
    )
    steps = Text(" ")
    for number, stage in enumerate(frame.stages):
        if number:
            steps.append(" › ", style="bright_black")
        style = (
            "green" if number < frame.stage else "bold yellow" if number == frame.stage else "bright_black"
        )
        steps.append(stage, style=style)
    return Group(title, steps)


def _events(frame: Frame) -> RenderableType:
    # The newest at the bottom; the panel cuts what does not fit at the top.
    return Panel(_Bottom(frame.events), title="what happens", title_align="left", border_style="bright_black")


class _Bottom:
    """The last lines that fit, each event's further lines below its text."""

    def __init__(self, events: tuple[Event, ...]) -> None:
        self._events = events

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: list[Text] = []
        for event in self._events:
            time_text = f"{event.at:5.1f}  "
            text = Text(event.text, style=MOOD_STYLES[event.mood])
            for number, line in enumerate(text.wrap(console, options.max_width - len(time_text))):
                first = time_text if number == 0 else " " * len(time_text)
                lines.append(Text.assemble((first, "bright_black"), line))
        yield Group(*lines[-(options.height or console.height) :])


def _tally(frame: Frame) -> RenderableType:
    tally = frame.tally
    lines: list[RenderableType] = _tree_lines(tally) if tally.routed else _full_lines(tally)
    lines.append(Text("numbers: round trip in ms", style="bright_black"))
    return Panel(Group(*lines), title="pairs", title_align="left", border_style="bright_black")


def _tree_lines(tally: Tally) -> list[RenderableType]:
    return [
        Text.assemble("routed by hubs  ", (f"{tally.routed}{_ROUTED_MARK}", f"bold {_ROUTED_STYLE}")),
        Text(f"linked with each other  {tally.direct + tally.relayed}"),
    ]


def _full_lines(tally: Tally) -> list[RenderableType]:
    lines: list[RenderableType] = [
        Text.assemble("direct and pinged  ", (f"{tally.direct} of {tally.possible}", "bold")),
        # A bar alone ends no line.
        Padding(ProgressBar(total=max(tally.possible, 1), completed=tally.direct, complete_style="green"), 0),
        Text(f"through a hub  {tally.relayed} of {tally.relayable}ʰ", style=_RELAYED_STYLE),
        Text(f"{tally.impossible} without any way", style="bright_black"),
    ]
    if tally.direct:
        lines.append(
            Text.assemble(
                (f"{tally.direct - tally.ipv6} over IPv4⁴", "cyan"),
                "   ",
                (f"{tally.ipv6} over IPv6⁶", "green"),
            )
        )
    for name, spread in (("path found", tally.direct_s), ("first ping", tally.first_ping_s)):
        if spread is not None:
            lines.append(Text(f"{name}  {spread.median:.2f} s, slowest {spread.largest:.2f} s"))
    return lines


def console() -> Console:
    """Where the demo speaks: as wide as the terminal, and elsewhere as wide as the table."""
    found = Console(file=sys.stdout, highlight=False)
    return found if found.is_terminal else Console(file=sys.stdout, highlight=False, width=_LINE_WIDTH)
