"""Packages and extras, from the metadata of what is installed."""

from __future__ import annotations

from importlib import metadata

import pytest

from numballama.doctor import packages
from numballama.doctor.packages import Extra, Package, Packages, Requirement, read_requirement

LINES = [
    "numpy<2.5,>=1.26",
    'numba-cuda[cu13]<0.31,>=0.30.4; extra == "cuda"',
    "numba-cuda[cu12]<0.31,>=0.30.4; extra == 'cuda12'",
    'uvicorn>=0.35; extra == "serve"',
    'numballama[serve]; extra == "ray"',
    'ray[serve]<2.61,>=2.60; extra == "ray"',
    'pytest>=8; extra == "test"',
]
INSTALLED = {"numpy": "2.4.6", "uvicorn": "0.20.0", "numba-cuda": "0.30.4"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that seem to be installed."""
    found = dict(INSTALLED)

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(packages.metadata, "requires", lambda name: LINES)
    monkeypatch.setattr(packages.metadata, "version", version)
    return found


def test_requirements_are_read() -> None:
    assert read_requirement(LINES[1]) == Requirement("numba-cuda", "<0.31,>=0.30.4", ("cu13",), "cuda")
    assert read_requirement("huggingface_hub (>=0.34)") == Requirement("huggingface-hub", ">=0.34", (), "")


def test_extras_of_users(installed: dict[str, str]) -> None:
    pytest.importorskip("packaging")
    found = Packages.find()
    assert [str(package) for package in found.needed] == ["numpy 2.4.6"]
    extras = {extra.name: extra for extra in found.extras}
    assert list(extras) == ["cuda", "ray", "serve"], "no cuda12 beside cuda, nothing for developers"
    assert extras["cuda"].installed and not extras["serve"].installed
    assert str(extras["serve"].packages[0]) == "uvicorn 0.20.0 (needs >=0.35)"
    assert [package.name for package in extras["ray"].packages] == ["uvicorn", "ray"]
    assert extras["ray"].to_dict()["command"] == 'pip install "numballama[ray]"'
    assert str(Package("ray", None, ">=2.60")) == "ray missing"


def test_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", requires)
    assert Packages.find() == Packages((), ())


def test_an_extra_that_is_installed_needs_no_command() -> None:
    assert Extra("hub", (Package("huggingface-hub", "1.0", ""),)).to_dict()["command"] is None
