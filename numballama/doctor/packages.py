"""Packages that are installed: those that numballama needs, and those of its extras."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

NAME = "numballama"
FOR_DEVELOPERS = ("test", "dev", "docs")
"""Extras that only work on numballama itself needs."""
INSTEAD_OF = {"cuda12": "cuda"}
"""Extra → the extra that it replaces; a user has one of them."""


@dataclass(frozen=True)
class Requirement:
    """One line of a package's metadata: a package that it needs."""

    package: str
    versions: str
    """Such as ">=2.11,<3"; empty: any."""
    extras: tuple[str, ...]
    """Extras of that package."""
    extra: str
    """The extra that needs it; empty: needed always."""


def read_requirement(line: str) -> Requirement:
    """The parts of a requirement such as `pydantic<3,>=2.11; extra == "serve"`."""
    wanted, _, marker = line.partition(";")
    found = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?\s*(.*)", wanted)
    assert found is not None, line
    extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)
    extras = tuple(part.strip() for part in (found[2] or "").split(",") if part.strip())
    return Requirement(found[1].lower().replace("_", "-"), found[3].strip(" ()"), extras, extra[1] if extra else "")


@dataclass(frozen=True)
class Package:
    """A package that is needed, and its version."""

    name: str
    version: str | None
    """None: it is not installed."""
    wanted: str
    """The versions that fit; empty: any."""

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that is wanted. Without the package `packaging`, any version fits."""
        if self.version is None:
            return False
        try:
            from packaging.specifiers import SpecifierSet
        except ImportError:
            return True
        return SpecifierSet(self.wanted).contains(self.version, prereleases=True)

    def __str__(self) -> str:
        if self.fits:
            return f"{self.name} {self.version}"
        return f"{self.name} {self.version or 'missing'}" + (f" (needs {self.wanted})" if self.version else "")


@dataclass(frozen=True)
class Extra:
    """An extra of numballama and its packages."""

    name: str
    packages: tuple[Package, ...]

    @property
    def installed(self) -> bool:
        """Whether all its packages are installed."""
        return all(package.fits for package in self.packages)

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f'pip install "{NAME}[{self.name}]"'

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        packages = [asdict(package) for package in self.packages]
        return {"installed": self.installed, "packages": packages, "command": None if self.installed else self.command}


@dataclass(frozen=True)
class Packages:
    """Packages that numballama needs, and its extras. Both are empty if it is not installed as a package."""

    needed: tuple[Package, ...]
    extras: tuple[Extra, ...]

    @classmethod
    def find(cls) -> Packages:
        """Those that numballama's own metadata names, with the versions that are installed."""
        try:
            lines = metadata.requires(NAME) or []
        except metadata.PackageNotFoundError:
            return cls((), ())
        requirements = [read_requirement(line) for line in lines]
        extras = dict.fromkeys(r.extra for r in requirements if r.extra and r.extra not in FOR_DEVELOPERS)
        found = {name: Extra(name, tuple(_packages(requirements, name))) for name in extras}
        shown = [
            extra
            for name, extra in found.items()
            if name not in INSTEAD_OF or (extra.installed and not found[INSTEAD_OF[name]].installed)
        ]
        return cls(tuple(_packages(requirements, "")), tuple(sorted(shown, key=lambda extra: extra.name)))


def _packages(requirements: list[Requirement], extra: str) -> Iterator[Package]:
    """The packages that an extra needs, those of other extras that it names included."""
    for requirement in requirements:
        if requirement.extra != extra:
            continue
        if requirement.package == NAME:
            for other in requirement.extras:
                yield from _packages(requirements, other)
        else:
            yield Package(requirement.package, _version(requirement.package), requirement.versions)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
