"""No object of ours prints a secret, at no moment of an exchange: all that live are asked, in every form."""

from __future__ import annotations

import base64
import gc
from collections.abc import Iterator

from scope_agent.inputs import SavePsk, SetUpKeys
from scope_agent.psk.core import PskOutput, WriteRecord
from scope_agent.psk.slots import Record

from tests.unit.psk_duo import Duo, Side


class _Asked(Duo):
    """At each output of either side all living objects of ours are printed."""

    count = 0
    told: set[str]

    def spoils(self, side: Side, output: PskOutput) -> bool:
        forms = {form for secret in self._secrets(output) for form in _forms(secret)}
        for living in (output, *_living()):
            printed = repr(living)
            self.count += 1
            self.told |= {type(living).__name__ for form in forms if form in printed}
        return False

    def _secrets(self, output: PskOutput) -> Iterator[bytes]:
        records: list[Record] = [side.disk for side in self.sides]
        if isinstance(output, WriteRecord) and output.record is not None:
            records.append(output.record)
        for record in records:
            for keys in (record.current, record.next):
                if keys is not None:
                    yield from (keys.psk.raw, keys.chain.raw, keys.confirm_d.raw, keys.confirm_e.raw)
        for side in self.sides:
            yield from (side.identity.ed448.raw, side.identity.mldsa.raw)


def _living() -> list[object]:
    """Of ours, and younger than the test."""
    ours = ("scope.", "scope_agent.")
    return [each for each in gc.get_objects() if str(type(each).__module__).startswith(ours)]


def _forms(secret: bytes) -> tuple[str, ...]:
    return (
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        secret.hex(),
        repr(secret)[2:-1],
        str(list(secret))[1:-1],
    )


def test_nothing_that_lives_during_an_exchange_prints_a_secret() -> None:
    gc.freeze()
    try:
        duo = _Asked(1)
        duo.told = set()
        duo.start()
        duo.until(duo.is_agreed, within=200.0)
    finally:
        gc.unfreeze()
    record = duo.d.disk
    assert record.current is not None and duo.count > 100
    for each in (SavePsk(duo.e.key, record), WriteRecord(duo.e.key, record), SetUpKeys(is_awaited=True)):
        assert record.current.psk.raw.hex() not in repr(each)
    assert duo.told == set()
