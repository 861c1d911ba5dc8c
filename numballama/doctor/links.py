"""The links between the GPUs of a host: which reach each other's memory, by what, and which could share a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cuda.driver import Device

LEGEND = (
    "NVLink: peer access with native atomics; PCIe: without them; no: no peer access; ?: not known",
    "the number is the driver's rank of the link, 0 is the fastest",
)


@dataclass(frozen=True)
class GpuLink:
    """The link between two GPUs. A fact is None where the driver did not answer; `problem` says why."""

    device: str
    peer: str
    kind: str = "unknown"
    """ "NVLink", "PCIe", "none" (no peer access) or "unknown". The driver does not name links: over NVLink all atomics
    are native, over PCIe they are not."""
    peer_access: bool | None = None
    """Whether each GPU can read and write the other's memory (cuDeviceCanAccessPeer, both ways)."""
    access_supported: bool | None = None
    """The link's own attribute."""
    native_atomics: bool | None = None
    performance_rank: int | None = None
    """Relative to other links of this host; 0 is the fastest."""
    problem: str | None = None

    @classmethod
    def of(cls, device: Device, peer: Device) -> GpuLink:
        """Ask the driver. A question that fails leaves its answer None and is named in `problem`."""
        failed: dict[str, list[str]] = {}

        def ask(what: str, question: Callable[[], int]) -> int | None:
            try:
                return question()
            except Exception as error:  # also those of NVIDIA's packages: one link must not end the whole check
                message = " ".join(str(error).split()) or type(error).__name__
                failed.setdefault(message, []).append(what)
                return None

        there = ask("peer access", lambda: device.can_access(peer))
        back = ask("peer access back", lambda: peer.can_access(device))
        supported = ask("access supported", lambda: device.link_attribute(peer, "ACCESS_SUPPORTED"))
        atomics = ask("native atomics", lambda: device.link_attribute(peer, "NATIVE_ATOMIC_SUPPORTED"))
        rank = ask("performance rank", lambda: device.link_attribute(peer, "PERFORMANCE_RANK"))
        access = False if False in (there, back) else None if None in (there, back) else True
        return cls(
            f"cuda:{device.index}",
            f"cuda:{peer.index}",
            _kind(access, atomics),
            access,
            None if supported is None else bool(supported),
            None if atomics is None else bool(atomics),
            rank,
            "; ".join(f"{', '.join(what)}: {message}" for message, what in failed.items()) or None,
        )

    def __str__(self) -> str:
        """As in the table: "NVLink 0", "PCIe", "no", "?"."""
        if self.kind in ("none", "unknown"):
            return "no" if self.kind == "none" else "?"
        return self.kind if self.performance_rank is None else f"{self.kind} {self.performance_rank}"


def _kind(access: bool | None, atomics: int | None) -> str:
    if access is False:
        return "none"
    if access is None or atomics is None:
        return "unknown"
    return "NVLink" if atomics else "PCIe"


def find_links(devices: Sequence[Device]) -> list[GpuLink]:
    """The links of all pairs, in the order of the devices. There is none for fewer than two."""
    return [GpuLink.of(device, peer) for device, peer in itertools.combinations(devices, 2)]


def groups(cards: Sequence[str], links: Sequence[GpuLink]) -> list[list[str]]:
    """Cards that could share a model: within a group each reaches the memory of each. A card is in one group."""
    reached = {frozenset((link.device, link.peer)) for link in links if link.peer_access}
    found: list[list[str]] = []
    for card in cards:
        for group in found:
            if all(frozenset((card, other)) in reached for other in group):
                group.append(card)
                break
        else:
            found.append([card])
    return found


def lines(links: Sequence[GpuLink], working: Sequence[str], with_nccl: bool = False) -> Iterator[str]:
    """A table of all pairs, what was not found out, and what follows for the cards that work. Nothing without links."""
    if not links:
        return
    yield from _table(links)
    yield from LEGEND
    for link in links:
        if link.problem:
            yield f"{link.device}, {link.peer}: {link.problem}"
    yield _conclusion(links, working, with_nccl)


def _table(links: Sequence[GpuLink]) -> Iterator[str]:
    names = [links[0].device, *(link.peer for link in links if link.device == links[0].device)]
    cells = {(link.device, link.peer): str(link) for link in links}
    cells |= {(peer, device): cell for (device, peer), cell in cells.items()}
    rows = [["links", *names], *([name, *(cells.get((name, other), "-") for other in names)] for name in names)]
    width = max(len(cell) for row in rows for cell in row)
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell in row).rstrip()


def _conclusion(links: Sequence[GpuLink], working: Sequence[str], with_nccl: bool) -> str:
    if len(working) < 2:
        return "fewer than two of these cards ran the kernel: no cards can share a model"
    unknown = any(link.peer_access is None and {link.device, link.peer} <= {*working} for link in links)
    known = "as far as is known, " if unknown else ""
    found = groups(working, links)
    together = "; ".join(", ".join(group) for group in found if len(group) > 1)
    alone = ", ".join(group[0] for group in found if len(group) == 1)
    if with_nccl and len(found) > 1:
        if not together:
            return f"{known}no card reaches another's memory: several can share a model through NCCL, which is slower"
        return f"{known}several cards can share a model: {together}; through NCCL, which is slower, all"
    if not together:
        return f"{known}no card reaches another's memory: only replicas of a model, one on each card"
    return f"{known}several cards can share a model: {together}" + (f"; only replicas: {alone}" if alone else "")
