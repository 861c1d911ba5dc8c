"""Models named by their id on the Hugging Face hub: downloads them into the hub library's cache.

A name is "owner/name", "owner/name:Q4_K_M" (a GGUF file of that type) or "owner/name/file.gguf". "owner/name" is the
repository's safetensors; if it has none, one of its GGUF files, else its `pytorch_model.bin`. Which GGUF file a name
means is llama.cpp's rule (its option -hf), with two additions: of several that a type fits, the one whose type it is
exactly counts, and without a type files that do not fit the memory or have a type that is not read come last.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from . import progress
from .errors import Error
from .memory import available_bytes, format_bytes

_REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(_REPOSITORY)
_NAME = re.compile(
    rf"(?P<repository>{_REPOSITORY})(:(?P<tag>[\w.-]{{1,64}})|/(?P<file>[\w.+ /()-]{{1,255}}\.gguf))?", re.I
)
_SITE = re.compile(r"((https?://)?(www\.)?(hf\.co|huggingface\.co)/)|hf://(models/)?", re.I)
_BRANCH = re.compile(r"/(blob|resolve|tree)/main(?=/|$)")
_REVISION = re.compile(rf"{_REPOSITORY}/(blob|resolve|tree)/(?P<revision>[^/]+)")
_FILES = (".bin", ".gguf", ".safetensors", ".pth", ".pt", ".model", ".json")

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files of a tokenizer and of its settings."""

_OTHER_VOCABULARIES = frozenset(("tokenizer.model", "tokenizer.model.v*", "vocab.json", "merges.txt"))
"""Those of `TOKENIZER_FILES` that are not read beside a tokenizer.json that is."""

ADAPTER = "adapter_config.json"
"""Says that safetensors are an adapter, which is no model by itself."""
MODEL_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    ADAPTER,
    *TOKENIZER_FILES,
)
"""Files that `formats.hf` reads. The rest of a repository (other formats, pictures) is not downloaded."""

_TORCH = re.compile(r"pytorch_model[\w.-]*\.bin(\.index\.json)?")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})", re.DOTALL | re.I)
_TYPE = re.compile(r"[-.]([A-Z0-9_]+)$", re.I)
_IS_TYPE = re.compile(r"(I?Q|TQ)[1-8]_\w+|FP?(16|32)|BF16|(MX|NV)FP4(_\w+)?", re.I)
_READABLE = re.compile(r"FP?32|FP?16|BF16|Q8_0|Q[45]_[01]|Q[2-6]_K(_[SML]|_XL)?|IQ4_(NL|XS)", re.I)
_FILE_ERRORS = ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOTDIR", "EISDIR", "ENOENT", "EMFILE")
_OF_FILES = frozenset(number for name in _FILE_ERRORS if (number := getattr(errno, name, None)) is not None)
"""Errors of the cache's folder, not of the network."""
NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""Parts of names of GGUF files that are no language model by themselves."""
PREFERRED = ("Q4_K_M", "Q8_0")
"""Types to take when a name gives none, in this order."""
MEMORY_SHARE = 0.75
"""A file fits if it takes at most this share of the free memory: the KV cache and the program want the rest."""


@dataclass(frozen=True)
class Name:
    """A model on the hub as users write it."""

    repository: str
    tag: str | None = None
    """Type of a GGUF file, such as "Q4_K_M"."""
    file: str | None = None
    """Path of a GGUF file in the repository."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file of a repository, or all parts of a split one, the first first."""

    parts: tuple[str, ...]
    size: int
    """Bytes of all parts; 0 if unknown."""
    type: str
    """Its type in upper case ("Q4_K_M"), from the end of its name, else of its folder's; "" without one."""


def is_id(name: str) -> bool:
    """Whether `name` can be a hub id: two words with one slash between them, without the suffix of a model file."""
    return bool(_ID.fullmatch(name)) and ".." not in name and not name.lower().endswith(_FILES)


def parse(name: str) -> Name | None:
    """The parts of a name, or of an address on the hub's site; None if it can be no model of the hub.

    Raises `Error` for an address of another branch or commit than main.
    """
    if site := _SITE.match(name):
        address = name[site.end() :].partition("?")[0].partition("#")[0].rstrip("/")
        if (other := _REVISION.match(address)) and other["revision"] != "main":
            raise Error(f"{name}: the branch main of a model is read only, not {other['revision'][:80]!r}")
        name = _BRANCH.sub("", address, count=1)
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or "//" in name or not is_id(match["repository"]):
        return None
    tag = match["tag"]
    return Name(match["repository"], None if tag is None or tag.lower() == "latest" else tag, match["file"])


def resolve(path: str | PathLike[str], patterns: Sequence[str] = MODEL_FILES) -> str | PathLike[str]:
    """`path` itself or, if it names a model of the hub and nothing local, the directory of its downloaded files that
    match `patterns`, or its downloaded GGUF file. Raises `Error` as `download` does.
    """
    return locate(path, [], patterns)


def locate(path: str | PathLike[str], notes: list[str], patterns: Sequence[str] = MODEL_FILES) -> str | PathLike[str]:
    """`resolve`, which also adds to `notes` which file was chosen and why."""
    name = parse(path) if isinstance(path, str) and not os.path.exists(path) else None
    if name is None:
        return path
    if name.tag is None and name.file is None:
        try:
            folder = download(name.repository, patterns, str(path))
            if patterns != MODEL_FILES or any(folder.glob("*.safetensors")):
                return folder
        except Error:  # out of reach, with a GGUF file in the cache but not the small files beside it
            if patterns != MODEL_FILES or not gguf_models(_cached(name.repository)):
                raise
    return _other_files(name, notes, str(path))


def _other_files(name: Name, notes: list[str], given: str) -> Path:
    """Download what a repository without safetensors has, or the GGUF file that `name` asks for."""
    files = _files_of(name.repository, given)
    models = gguf_models(files)
    if models or name.tag or name.file:
        model = choose(models, name, available_bytes())
        if model is None:
            asked = f"no GGUF file {name.file}" if name.file else f"no GGUF file of type {name.tag}"
            known = ", ".join(model.parts[0] for model in models[:30]) or "none"
            raise Error(f"{name.repository}: on the hub it has {asked}; its GGUF files are: {known}")
        if name.tag is None and name.file is None:
            notes.append(
                f"{name.repository} has {len(models)} GGUF files: {model.parts[0]} is used; another one by "
                f"'{name.repository}:TYPE'"
            )
        progress.info(f"{name.repository}: {model.parts[0]}, {format_bytes(model.size)}")
        return download(name.repository, [glob.escape(part) for part in model.parts], given) / model.parts[0]
    others = [file for file in files if _TORCH.fullmatch(file) or re.fullmatch(r"[^/]+\.safetensors", file)]
    if not others:
        known = ", ".join(list(files)[:20]) or "none"
        raise Error(
            f"{name.repository}: on the hub it has no safetensors, GGUF or pytorch_model.bin; its files: {known}"
        )
    return download(name.repository, [*TOKENIZER_FILES, ADAPTER, *map(glob.escape, others)], given)


def gguf_models(files: Mapping[str, int]) -> list[GgufModel]:
    """The language models among a repository's files (path → bytes), in the order of the files. Split ones whole."""
    found = []
    for path in files:
        name = path.rpartition("/")[2].lower()
        if not name.endswith(".gguf") or any(word in name for word in NO_MODEL):
            continue
        parts, stem = [path], path[: -len(".gguf")]
        if split := _SPLIT.fullmatch(stem):
            stem, count = split["stem"], int(split["count"])
            parts = [f"{stem}-{part + 1:05}-of-{count:05}{path[-5:]}" for part in range(min(count, 1000))]
            if parts[0] != path or not all(part in files for part in parts):
                continue
        found.append(GgufModel(tuple(parts), sum(files[part] for part in parts), _type_of(stem)))
    return found


def _type_of(stem: str) -> str:
    """The type in a path without suffix: the end of the file's name, else of its folder's; "" if there is none."""
    folder, _, name = stem.rpartition("/")
    own, outer = _TYPE.search(f"/{name}"), _TYPE.search(f"-{folder}")
    if outer is not None and _IS_TYPE.fullmatch(outer[1]) and not (own and _IS_TYPE.fullmatch(own[1])):
        own = outer
    return own[1].upper() if own else ""


def choose(models: Sequence[GgufModel], name: Name, free: int | None) -> GgufModel | None:
    """The model that a name means; None if there is none. `free` is the free memory in bytes, None if unknown.

    A file is found by its path, whatever the case, and by any part of a split model. A type is found in the path before
    a dot or dash, or as the end of a folder's name. Without either: of the models that are readable and fit the memory,
    the first of type Q4_K_M, else Q8_0, else the largest; if none fits, the smallest.
    """
    if name.file is not None:
        asked = name.file.lower()
        return next((model for model in models if asked in map(str.lower, model.parts)), None)
    if name.tag is not None:
        found = []
        for ends in ("[.-]", "/"):
            pattern = re.compile(re.escape(name.tag) + ends, re.I)
            found += [model for model in models if pattern.search(model.parts[0])]
        return next((model for model in found if model.type == name.tag.upper()), found[0] if found else None)
    readable = [model for model in models if not model.type or _READABLE.fullmatch(model.type)] or list(models)
    fitting = [model for model in readable if free is None or model.size <= free * MEMORY_SHARE]
    for kind in PREFERRED:
        if chosen := next((model for model in fitting if model.type == kind), None):
            return chosen
    if fitting:
        return max(fitting, key=lambda model: model.size)
    return min(readable, key=lambda model: model.size, default=None)


def download(repository: str, patterns: Sequence[str] = MODEL_FILES, given: str | None = None) -> Path:
    """Download the files of a repository that match `patterns`, unless they are in the hub's cache; returns their
    directory. `given` is the user's name for it.

    Raises `Error` when the library is missing or the files cannot be downloaded. The message says what to download and
    where to put it.
    """
    with _hub_errors(given or repository, repository):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        if progress.quiet:
            disable_progress_bars()
        try:
            return Path(snapshot_download(repository, allow_patterns=list(patterns)))
        except Exception as error:  # out of reach, and another program downloaded the files that it reads
            folder = getattr(error, "snapshot_path", None)
            if folder is None or not os.path.exists(os.path.join(folder, "tokenizer.json")):
                raise
            needed = [pattern for pattern in patterns if pattern not in _OTHER_VOCABULARIES]
            return Path(snapshot_download(repository, allow_patterns=needed, local_files_only=True))


def _files_of(repository: str, given: str) -> dict[str, int]:
    """Path → bytes of a repository's files; of those in the cache, if the hub is out of reach."""
    with _hub_errors(given, repository):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            HfApi().repo_info(repository, revision="main")  # fails at once without a network; a listing takes six tries
            entries = HfApi().list_repo_tree(repository, recursive=True)
            return {entry.path: int(entry.size or 0) for entry in entries if hasattr(entry, "size")}
        except HfHubHTTPError:
            raise
        except Exception:  # as in `_hub_errors`: out of reach
            if files := _cached(repository):
                return files
            raise


def _cached(repository: str) -> dict[str, int]:
    """Path → bytes of a repository's files in the cache."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=[""]))  # finds, loads nothing
    except Exception:  # no library, nothing cached
        return {}
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _hub_errors(given: str, repository: str) -> Iterator[None]:
    """Turn what goes wrong with the hub and its library into an `Error` that says what to do."""
    by_hand = (
        f"or download config.json, generation_config.json, {', '.join(MODEL_FILES[:2])} and the tokenizer's files, or "
        f"a GGUF file, from https://huggingface.co/{repository} into a directory, and give its path"
    )
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise Error(
            f"{given}: no such file or directory, and a model of the hub needs huggingface_hub: "
            f"pip install 'numballama[hub]'; {by_hand}"
        ) from None
    try:
        yield
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        reason = {401: "it needs a login (hf auth login)", 403: "its licence must be accepted there first"}.get(status)
        reason = reason or ("there is no such model" if status == 404 else f"the hub answers {status}")
        raise Error(f"{given}: no such file or directory, and on the hub {reason}; {by_hand}") from error
    except Exception as error:  # the hub library, its HTTP library and the system raise many classes
        if isinstance(error, OSError) and error.errno in _OF_FILES:
            place = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
            raise Error(
                f"{given}: its files cannot be written to the hub's cache {constants.HF_HUB_CACHE}: {error.strerror}"
                f"{place}; make room or choose another folder with HF_HOME; {by_hand}"
            ) from error
        offline = "the hub is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        if missing := re.search(r"\d+ file\(s\) are missing \(.*?\)", str(error)):  # not all was downloaded before
            offline += f", and of the copy in its cache {missing[0]}"
        raise Error(
            f"{given}: no such file or directory, and {offline}; on a machine that reaches it, run "
            f"'hf download {repository}' and copy its folder into {constants.HF_HUB_CACHE}; {by_hand}"
        ) from error
