"""Many agents that start at once behind NATs that take an early packet for their own: all pairs are direct.

Such a NAT moves the port of the peer behind it when a full probe comes before the peer's own, and twelve
agents that start on two cores are late by chance. The agents call before they probe in full.
"""

from __future__ import annotations

from lab import Lab, Nat
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, mesh_document

KINDS = (*[Nat.PORT_RESTRICTED_OPEN_INPUT] * 8, *[Nat.PORT_RESTRICTED] * 2, Nat.CGNAT, Nat.NONE)
CONVERGED_S = 50.0  # before the first rest of a search would be over: nothing is healed, nothing was broken
SECOND_VIEW_S = 90.0  # who has missed the answer of one reflector asks again within a minute


def test_many_agents_behind_open_inputs_that_start_at_once_are_all_direct() -> None:
    with Lab(delay_ms=20, private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document("crowd"))
        token = registry.token("crowd")
        members = [
            Member(lab.site(f"site-{n}", nat=kind).machine(f"m-{n}"), mesh="crowd", registry=registry)
            for n, kind in enumerate(KINDS)
        ]
        for member in members:
            member.join(token)
        with Watch(members, pinger) as watch:
            watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
            expected = {
                member.name: "None" if member.machine.place.nat is Nat.NONE else "EndpointIndependent"
                for member in members
            }

            def told() -> dict[str, str]:
                return {name: status.mapping for name, status in watch.statuses.items()}

            watch.until(
                lambda: told() == expected, within_s=SECOND_VIEW_S, missing=lambda: f"not all know: {told()}"
            )
