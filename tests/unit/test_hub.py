"""Hub ids: what is one, what is downloaded, and what the errors advise."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import numballama
from numballama import hub
from numballama.errors import Error, FormatError, UnsupportedError
from numballama.export import export_model
from numballama.files import map_file
from numballama.formats.gguf.header import Header
from numballama.loader import open_checkpoint
from tests.helpers.gguf_files import CONFIG, save, split
from tests.helpers.hf_files import tensors
from tests.helpers.torch_files import save_torch


def test_hub_ids() -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "a/b"):
        assert hub.is_id(name)
    for name in ("model", "a/b/c", "../b", "./b", "/a/b", "~/b", "a/..", "models/x.bin", "a/b.gguf", "a b/c", "", "a/"):
        assert not hub.is_id(name)


def test_a_hub_id_is_downloaded_once_it_is_no_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Callable[[str], Path]
) -> None:
    library = pytest.importorskip("huggingface_hub")
    folder, asked = copy("llama"), []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(library, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").path == folder
    assert [name for name, _ in asked] == ["owner/name"]
    assert "config.json" in asked[0][1] and not any("pth" in pattern or "bin" in pattern for pattern in asked[0][1])
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert open_checkpoint("owner/name").path == Path("owner/name")
    assert len(asked) == 1
    with pytest.raises(FormatError, match="without a tokenizer"):
        numballama.load_tokenizer("other/name")
    assert asked[1][0] == "other/name" and not any("safetensors" in pattern for pattern in asked.pop()[1])
    with pytest.raises(Error, match="no such file"):
        open_checkpoint(tmp_path / "owner" / "other")
    assert len(asked) == 1


def test_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Error) as caught:
        open_checkpoint("owner/name")
    text = str(caught.value)
    assert text.startswith("owner/name: no such file or directory, and the hub is switched off (HF_HUB_OFFLINE)")
    assert "config.json" in text and "https://huggingface.co/owner/name" in text and str(tmp_path) in text


# ---- names ----


@pytest.mark.parametrize(
    ("name", "repository", "tag", "file"),
    [
        ("a/b", "a/b", None, None),
        ("bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", "bartowski/Llama-3.2-1B-Instruct-GGUF", "Q4_K_M", None),
        ("a/b:iq4_xs", "a/b", "iq4_xs", None),
        ("a/b:UD-Q4_K_XL", "a/b", "UD-Q4_K_XL", None),
        ("a/b:latest", "a/b", None, None),
        ("a/b/c.gguf", "a/b", None, "c.gguf"),
        ("a/b/Q4_K_M/c-00001-of-00002.GGUF", "a/b", None, "Q4_K_M/c-00001-of-00002.GGUF"),
        ("hf.co/a/b:Q8_0", "a/b", "Q8_0", None),
        ("hf://a/b", "a/b", None, None),
        ("hf://models/a/b/c.gguf", "a/b", None, "c.gguf"),
        ("https://huggingface.co/a/b", "a/b", None, None),
        ("https://huggingface.co/a/b/#usage", "a/b", None, None),
        ("https://huggingface.co/a/b/tree/main", "a/b", None, None),
        ("https://huggingface.co/a/b/blob/main/d/c.gguf", "a/b", None, "d/c.gguf"),
        ("https://huggingface.co/a/b/resolve/main/c.gguf?download=true", "a/b", None, "c.gguf"),
    ],
)
def test_names(name: str, repository: str, tag: str | None, file: str | None) -> None:
    assert hub.parse(name) == hub.Name(repository, tag, file)


@pytest.mark.parametrize(
    "name",
    ["model", "a/b/c", "a/b:", "a/b:Q4 K", "a/b:../x", "a/b.gguf", "a/b.gguf:Q4", "../b/c.gguf", "./a/c.gguf",
     "/a/b/c.gguf", "~/a/c.gguf", "a//b.gguf", "a/b/../c.gguf", "C:/a/b.gguf", "hf.co/a", "https://example.org/a/b",
     "a/b/c.safetensors", ""],
)  # fmt: skip
def test_other_names(name: str) -> None:
    assert hub.parse(name) is None


def test_addresses_of_other_branches() -> None:
    for kind in ("blob", "resolve", "tree"):
        with pytest.raises(Error, match="the branch main of a model is read only, not 'abc123'"):
            hub.parse(f"https://huggingface.co/a/b/{kind}/abc123/c.gguf")
    assert hub.parse("a/b/resolve/abc123/c.gguf") is not None, "a folder of a repository"


def test_all_files_of_chat_templates_are_downloaded() -> None:
    """Those that `formats.hf` reads."""
    assert {"chat_template.jinja", "chat_template.json"} < set(hub.TOKENIZER_FILES)
    assert fnmatch("additional_chat_templates/tool_use.jinja", hub.TOKENIZER_FILES[-1])


# ---- which GGUF file ----

GIB = 1 << 30
FILES = {
    "README.md": 9, "imatrix.dat": 9, "m-imatrix.gguf": 9, "mmproj-m-F16.gguf": GIB, "mtp-m-Q8_0.gguf": GIB,
    "m-BF16.gguf": 16 * GIB, "m-F16.gguf": 16 * GIB, "m-IQ2_M.gguf": 2 * GIB, "m-Q2_K.gguf": 3 * GIB,
    "m-Q4_K_M.gguf": 5 * GIB, "m-Q4_K_S.gguf": 4 * GIB, "m-Q6_K.gguf": 6 * GIB, "m-Q8_0.gguf": 8 * GIB,
    "f32/m-f32-00001-of-00002.gguf": 16 * GIB, "f32/m-f32-00002-of-00002.gguf": 16 * GIB,
    "m-Q5_K_M-00001-of-00003.gguf": 2 * GIB, "m-Q5_K_M-00003-of-00003.gguf": 2 * GIB,  # the second is missing
}  # fmt: skip


def chosen(name: str, free: int | None = None, files: dict[str, int] = FILES) -> str | None:
    parsed = hub.parse(name)
    assert parsed is not None
    model = hub.choose(hub.gguf_models(files), parsed, free)
    return None if model is None else model.parts[0]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a/b:Q4_K_M", "m-Q4_K_M.gguf"),
        ("a/b:q4_k_m", "m-Q4_K_M.gguf"),
        ("a/b:Q4_K", None),
        ("a/b:F16", "m-F16.gguf"),  # llama.cpp takes BF16, in which F16 stands as well
        ("a/b:bf16", "m-BF16.gguf"),
        ("a/b:f32", "f32/m-f32-00001-of-00002.gguf"),
        ("a/b:IQ2_M", "m-IQ2_M.gguf"),  # asked for by name, read or not
        ("a/b:Q5_K_M", None),
        ("a/b:Q3_K_M", None),
        ("a/b/M-Q2_K.gguf", "m-Q2_K.gguf"),
        ("a/b/f32/m-f32-00002-of-00002.gguf", "f32/m-f32-00001-of-00002.gguf"),
        ("a/b/m-Q3_K.gguf", None),
    ],
)
def test_a_gguf_file_by_type_or_name(name: str, file: str | None) -> None:
    assert chosen(name, free=1) == file, "what is asked for is not measured against the memory"


TYPES = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q8_0", "IQ2_M", "F16", "BF16", "UD-Q4_K_XL", "MXFP4")


@given(
    st.lists(st.sampled_from(TYPES), min_size=1, max_size=5, unique=True),
    st.sampled_from(["", "-0.6B", "-it", ".v2", "-1"]),
    st.sampled_from(["folder", "folder of a longer name", "both", "file"]),
    st.booleans(),
    st.data(),
)
def test_a_type_in_a_folders_or_a_files_name(
    kinds: list[str], end: str, where: str, many: bool, data: st.DataObject
) -> None:
    """The file of each type is found by it, in any case, and only by it. Its type is known, so it can be chosen."""
    files = {}
    for kind in kinds:
        folder = {"folder": f"{kind}/", "both": f"{kind}/", "file": ""}.get(where, f"Some-Model{end}-{kind}/")
        stem = f"{folder}model{end}" + ("" if where.startswith("folder") else f"-{kind}")
        for part in range(1, 3 if many else 2):
            files[f"{stem}-{part:05}-of-00002.gguf" if many else f"{stem}.gguf"] = GIB
    files = dict(data.draw(st.permutations(list(files.items()))))
    models = hub.gguf_models(files)
    assert {model.type for model in models} == {kind.removeprefix("UD-") for kind in kinds}
    for kind in TYPES:
        spelled = data.draw(st.sampled_from([kind, kind.lower()]))
        found = chosen(f"a/b:{spelled}", files=files)
        if kind in kinds:
            assert found is not None and kind in found and not (kind == "F16" and "BF16" in found)
        else:
            assert found is None or (kind == "F16" and "BF16" in found), "llama.cpp's rule finds F16 in BF16"


@pytest.mark.parametrize(
    ("free", "file"),
    [(None, "m-Q4_K_M.gguf"), (100 * GIB, "m-Q4_K_M.gguf"), (6 * GIB, "m-Q4_K_S.gguf"), (4 * GIB, "m-Q2_K.gguf"),
     (GIB, "m-Q2_K.gguf")],
)  # fmt: skip
def test_without_a_type_the_memory_decides(free: int | None, file: str) -> None:
    assert chosen("a/b", free) == file


def test_without_a_type_and_without_the_preferred_ones() -> None:
    files = {name: size for name, size in FILES.items() if "Q4_K_M" not in name}
    assert chosen("a/b", 100 * GIB, files) == "m-Q8_0.gguf"
    files = {name: size for name, size in files.items() if "Q8_0" not in name}
    assert chosen("a/b", 100 * GIB, files) == "f32/m-f32-00001-of-00002.gguf"
    assert chosen("a/b", 30 * GIB, files) in ("m-F16.gguf", "m-BF16.gguf")
    assert chosen("a/b", 1, {"model.gguf": 5}) == "model.gguf"
    assert chosen("a/b", 1, {"m-IQ1_S.gguf": 5}) == "m-IQ1_S.gguf", "an error will say what it is"
    assert chosen("a/b", 1, {"README.md": 5}) is None
    assert chosen("a/b", 100, {"m-IQ1_S.gguf": 9, "m-FP16.gguf": 5}) == "m-FP16.gguf", "another name of F16"


class FakeHub:
    """A hub of one repository in place of the library's functions. `asked` has the patterns of every download."""

    def __init__(self, folder: Path, online: bool = True) -> None:
        self.folder, self.online, self.asked = folder, online, list[list[str]]()

    def repo_info(self, _: object, name: str, **options: Any) -> Any:
        if not self.online:
            raise ConnectionError("no network")

    def list_repo_tree(self, _: object, name: str, **options: Any) -> Any:
        assert self.online, "without a network a listing is tried six times, which takes 23 seconds"
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [SimpleNamespace(path=str(p.relative_to(self.folder)), size=p.stat().st_size) for p in sorted(files)]

    def snapshot_download(self, name: str, allow_patterns: list[str] | None = None, **options: Any) -> str:
        if not options.get("local_files_only"):
            self.asked.append(allow_patterns or [])
        return str(self.folder)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    library = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "cache"
    folder.mkdir()
    hub_ = FakeHub(folder)
    monkeypatch.setattr(library, "snapshot_download", hub_.snapshot_download)
    monkeypatch.setattr(library.HfApi, "repo_info", lambda *a, **o: hub_.repo_info(*a, **o))
    monkeypatch.setattr(library.HfApi, "list_repo_tree", lambda *a, **o: hub_.list_repo_tree(*a, **o))
    monkeypatch.chdir(tmp_path)
    return hub_


@pytest.mark.parametrize("online", [True, False])
def test_gguf_files_of_a_repository(fake: FakeHub, online: bool) -> None:
    fake.online = online  # out of reach, the files of the cache count
    for number, kind in enumerate(("Q4_0", "Q8_0", "F16")):
        save(fake.folder / f"m-{kind}.gguf", replace(CONFIG, context=16 + number))
    split(save(fake.folder / "big.gguf", replace(CONFIG, context=32)), 3, "m-F32")
    (fake.folder / "big.gguf").unlink()
    opened = open_checkpoint("owner/name:q4_0")
    assert opened.config.context == 16 and opened.notes == [] and fake.asked == [["m-Q4_0.gguf"]]
    assert open_checkpoint("owner/name/m-F16.gguf").config.context == 18
    assert open_checkpoint("owner/name:F32").config.context == 32
    assert fake.asked[-1] == [f"m-F32-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    fake.asked.clear()
    opened = open_checkpoint("owner/name")
    assert opened.config.context == 17 and fake.asked == [list(hub.MODEL_FILES), ["m-Q8_0.gguf"]]
    assert opened.notes == ["owner/name has 4 GGUF files: m-Q8_0.gguf is used; another one by 'owner/name:TYPE'"]
    with pytest.raises(
        Error, match=r"owner/name: on the hub it has no GGUF file of type Q2_K; its GGUF files are: m-F16"
    ):
        open_checkpoint("owner/name:Q2_K")
    with pytest.raises(Error, match=r"no GGUF file m-Q9\.gguf"):
        open_checkpoint("owner/name/m-Q9.gguf")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("owner/Model-2.5-GGUF:q4_0", "Model-2.5-GGUF"), ("owner/Model-2.5-GGUF/m.1-Q4_0.gguf", "m.1-Q4_0"),
     ("owner/Model-2.5-GGUF", "Model-2.5-GGUF")],
)  # fmt: skip
def test_an_exported_model_has_the_name_of_its_repository(
    fake: FakeHub, tmp_path: Path, name: str, wanted: str
) -> None:
    save(fake.folder / "m.1-Q4_0.gguf")
    export_model(name, tmp_path / "copy.gguf", "gguf")
    assert Header(map_file(tmp_path / "copy.gguf")).text("general.name") == wanted


class IncompleteError(FileNotFoundError):
    """As the library's IncompleteSnapshotError: out of reach, and files of the repository are not in the cache."""

    def __init__(self, folder: Path, missing: list[str]) -> None:
        super().__init__(
            f"The snapshot is incomplete: {len(missing)} file(s) are missing ({', '.join(missing)}). Re-run"
        )
        self.snapshot_path = str(folder)


@pytest.mark.parametrize(
    ("missing", "has_json", "fine"),
    [
        (["merges.txt", "vocab.json"], True, True),  # what transformers and vLLM do not download
        (["tokenizer.model"], True, True),
        (["tokenizer.model"], False, False),
        (["generation_config.json"], True, False),  # it has the ids that end a text
        (["model-00002-of-00002.safetensors", "vocab.json"], True, False),
    ],
)
def test_a_cache_that_another_program_filled(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, missing: list[str], has_json: bool, fine: bool
) -> None:
    """Out of reach, a vocabulary that is not read beside a tokenizer.json may be missing."""
    import huggingface_hub

    (fake.folder / "config.json").write_text("{}")
    (fake.folder / "model.safetensors").write_text("x")
    if has_json:
        (fake.folder / "tokenizer.json").write_text("{}")

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if lost := [file for file in missing if any(fnmatch(file, pattern) for pattern in allow_patterns)]:
            raise IncompleteError(fake.folder, lost)
        assert local_files_only
        return str(fake.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    if fine:
        assert hub.resolve("owner/name") == fake.folder
    else:
        with pytest.raises(
            Error, match=rf"out of reach, and of the copy in its cache 1 file.* missing \({missing[0]}\)"
        ):
            hub.resolve("owner/name")


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES", "ENOTDIR", "EROFS", "EFBIG"])
def test_a_folder_that_cannot_be_written_is_not_the_network(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: Any) -> str:
        code = getattr(errno, number)
        raise OSError(code, os.strerror(code), "/cache/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        Error, match=r"cannot be written to the hub's cache .*: .* \(/cache/blob\); make room or"
    ) as found:
        hub.resolve("owner/name")
    assert "out of reach" not in str(found.value)


def test_a_folder_of_the_hubs_cache_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "models--owner--name" / "snapshots" / "0123"
    copy.mkdir(parents=True)
    for folder in (copy.parent, copy.parent.parent):
        with pytest.raises(FormatError, match=r"a folder of the hub's cache; give the model's name.*snapshots/0123"):
            open_checkpoint(folder)


def test_a_local_file_of_that_name_counts(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save(tmp_path / "owner" / "name" / "m.gguf")
    assert open_checkpoint("owner/name/m.gguf").path == Path("owner/name/m.gguf") and fake.asked == []
    assert open_checkpoint("owner/name").path == Path("owner/name/m.gguf") and fake.asked == []
    save(tmp_path / "owner" / "name" / "n.gguf")
    with pytest.raises(FormatError, match=r"2 GGUF models; give the path of one: m\.gguf, n\.gguf"):
        open_checkpoint("owner/name")


def test_repositories_of_pytorch_files_and_of_nothing(fake: FakeHub, copy: Callable[[str], Path]) -> None:
    source = copy("llama")
    (fake.folder / "config.json").write_text((source / "config.json").read_text())
    (fake.folder / "README.md").write_text("a")
    with pytest.raises(Error, match=r"no safetensors, GGUF or pytorch_model\.bin; its files: README\.md, config"):
        open_checkpoint("owner/name")
    save_torch(fake.folder / "pytorch_model.bin", tensors(source))
    assert open_checkpoint("owner/name").config.n_layers == 2
    assert fake.asked[-1] == [*hub.TOKENIZER_FILES, hub.ADAPTER, "pytorch_model.bin"]
    for name in ("pytorch_model.bin", "config.json"):
        (fake.folder / name).unlink()
    (fake.folder / "adapter_model.safetensors").write_bytes(b"x")
    (fake.folder / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(UnsupportedError, match=r"an adapter of a/b .* not a model"):
        open_checkpoint("owner/name")


def test_a_typing_error_in_a_path_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Error, match=r"^models/llama/m\.gguf: no such file or directory, and the hub is switched off"):
        open_checkpoint("models/llama/m.gguf")


def test_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Error, match=r"pip install 'numballama\[hub\]'; or download config\.json"):
        open_checkpoint("owner/name")
