"""`numballama export`: writes a model of any readable format in another format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np

from . import hub, loader, progress
from .checkpoint import Checkpoint, LazyWeight, Weight
from .config import ModelConfig, RopePairing
from .errors import Error, UnsupportedError
from .files import expand_user
from .formats.gguf.writer import MetadataValue, write_gguf
from .formats.hf.text_files import DEFAULT_TEMPLATE, template_texts, tokenizer_texts
from .formats.hf.text_settings import TextSettings
from .formats.hf.writer import write_safetensors
from .formats.llama2c.kuiper import write_fp32, write_int8
from .formats.llama2c.llama2c import write_v0, write_v1, write_v2
from .formats.tokenizer_files import find_tokenizers, load_tokenizer
from .memory import format_bytes
from .quantization import policy
from .quantization.convert import DEFAULT_GROUP, convert, relative_error
from .quantization.types import BLOCKS, F32, WeightType
from .tokenizers.base import SPACE, Tokenizer, Vocabulary
from .tokenizers.bpe import BPETokenizer
from .tokenizers.vocab_merges import MERGES, VOCABULARY


@dataclass(frozen=True)
class WriteOptions:
    """What a format may hold besides config and weights. A writer ignores the fields that its format cannot hold."""

    group_size: int = DEFAULT_GROUP
    """Elements per int8 group."""
    name: str | None = None
    """Name of the model."""
    vocabulary: Vocabulary | None = None
    """Of a GGUF file. At most as many tokens as the embedding has rows."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Name → chat template of a GGUF file. "default" is the usual one."""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    """Additional metadata of a GGUF file."""
    bos_id: int | None = None
    eos_ids: Sequence[int] = ()
    token_ids: Mapping[str, int] = field(default_factory=dict)
    """Other ids for the config of a Hugging Face directory: "pad_token" → id."""
    files: Sequence[Path] = ()
    """Files to copy into a Hugging Face directory."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Path in a Hugging Face directory → content, to be written there."""


_DEFAULTS = WriteOptions()


class Writer(Protocol):
    """Writes a model, completely or not at all. Returns notes on what the format cannot hold."""

    def __call__(
        self,
        path: str | PathLike[str],
        config: ModelConfig,
        weights: Mapping[str, Weight],
        options: WriteOptions = ...,
    ) -> list[str]: ...


def _without_options(write: Callable[[str | PathLike[str], ModelConfig, Mapping[str, Weight]], list[str]]) -> Writer:
    return lambda path, config, weights, options=_DEFAULTS: write(path, config, weights)


def _with_groups(write: Callable[[str | PathLike[str], ModelConfig, Mapping[str, Weight], int], list[str]]) -> Writer:
    return lambda path, config, weights, options=_DEFAULTS: write(path, config, weights, options.group_size)


def _gguf(
    path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight], options: WriteOptions = _DEFAULTS
) -> list[str]:
    o = options
    return write_gguf(path, config, weights, o.vocabulary, o.name, o.chat_templates, o.metadata)


def _safetensors(
    path: str | PathLike[str], config: ModelConfig, weights: Mapping[str, Weight], options: WriteOptions = _DEFAULTS
) -> list[str]:
    o = options
    return write_safetensors(path, config, weights, o.bos_id, o.eos_ids, o.files, o.texts, o.token_ids)


WRITERS: dict[str, Writer] = {
    "llama2c-v0": _without_options(write_v0),
    "llama2c-v1": _without_options(write_v1),
    "llama2c-v2": _with_groups(write_v2),
    "kuiper": _without_options(write_fp32),
    "kuiper-int8": _with_groups(write_int8),
    "gguf": _gguf,
    "safetensors": _safetensors,
}
"""Format → its writer. "safetensors" is a Hugging Face directory, the others are single files."""

FLOAT_ONLY = ("llama2c-v0", "llama2c-v1", "kuiper")
INT8_ONLY = ("llama2c-v2", "kuiper-int8")
QUANTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FLOAT_ONLY, ("f32",)),
    **dict.fromkeys(INT8_ONLY, ("int8",)),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"),
    "safetensors": ("f32", "f16", "bf16"),
}
"""Format → values of `quantize`. GGUF also holds the other block types, if the source has them."""

_GROUPS = (64, 32, 16, 8, 4)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    VOCABULARY,
    MERGES,
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that belong to a tokenizer file beside them."""
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
"""Names of chat templates that are written. Those of a file can be anything, such as "../x"."""
_SAMPLE = "Once upon a time, in 1999:\n  two spaces; naïve 🙂"
"""Two tokenizers of the same tokens are taken for the same one if they agree on it."""
_NAMED_TOKENS = ("pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Special tokens, besides BOS and EOS, whose ids a config.json may have."""
_TOKEN_KEYS = {"pad_token": "padding", "sep_token": "seperator", "cls_token": "cls", "mask_token": "mask"}
"""Name of a special token → what GGUF calls it, in its spelling. BOS, EOS and unknown are parts of `Vocabulary`."""


@dataclass(frozen=True)
class Row:
    """One row of the report: a matrix that was written."""

    name: str
    before: WeightType
    after: WeightType
    nbytes: int
    """Bytes written."""
    error: float
    """Relative RMS error of the conversion: RMS of the difference over RMS of the source; 0.0 is exact."""


@dataclass(frozen=True)
class Exported:
    """The result of an export. Prints as a table."""

    path: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        changed = [row for row in self.rows if row.before != row.after]
        width = max([len(row.name) for row in changed] + [6])
        lines = [f"{'tensor':{width}}  {'from':8} {'to':8} {'bytes':>13}  relative RMS error"] if changed else []
        for row in changed:
            error = f"{row.error:.2e}" if row.error else "0"
            lines.append(f"{row.name:{width}}  {row.before!s:8} {row.after!s:8} {row.nbytes:13,}  {error:>18}")
        same = len(self.rows) - len(changed)
        size = format_bytes(sum(row.nbytes for row in self.rows))
        total = f"{len(changed)} matrices converted, {same} as they were, {size}"
        return "\n".join([*lines, f"{self.path}: {total}"])


class Converting(Mapping[str, Weight]):
    """Weights that are converted to `types` one at a time, when a writer reads their data. Never all are in memory.

    `report(name, before, after)` is called for each matrix whose data was read.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        types: Mapping[str, WeightType],
        report: Callable[[str, Weight, Weight], None],
        importance: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._weights, self._types, self._report, self._importance = weights, types, report, importance or {}

    def __getitem__(self, name: str) -> Weight:
        source = self._weights[name]
        kind = self._types.get(name, source.type)
        if len(source.shape) != 2:
            return source

        def make() -> Weight:
            before = source.make() if isinstance(source, LazyWeight) else source  # not cached by the source
            after = convert(before, kind, self._importance.get(name))
            self._report(name, before, after)
            return after

        return LazyWeight(source.shape, kind, make)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def export_model(
    source: str | PathLike[str] | None,
    path: str | PathLike[str],
    to: str,
    quantize: str | None = None,
    tokenizer: str | PathLike[str] | None = None,
    rope_pairing: RopePairing | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    importance: Mapping[str, np.ndarray] | Callable[[], Mapping[str, np.ndarray] | None] | None = None,
) -> Exported:
    """Write the model at `source` (None: the story model) to `path` in format `to`, a key of `WRITERS`.

    `quantize` is one of `QUANTS[to]`; None keeps the types of the source where the format can hold them. "q4_k", "q5_k"
    and "q6_k" are llama.cpp's mixtures Q4_K_M, Q5_K_M and Q6_K. `importance` (`importance.measure`) says how much the
    columns of a weight count; K-quants, q5_0 and q5_1 use it. A function that returns it is called once the types fit.

    The target is written completely or not at all. Matrices are converted one at a time, while they are written. Raises
    `UnsupportedError` for what the format cannot hold, `FormatError` for a damaged source, `Error` for bad arguments.
    """
    if to not in WRITERS:
        raise UnsupportedError(f"unknown format {to!r}; choose from {', '.join(WRITERS)}")
    if quantize is not None and quantize not in QUANTS[to]:
        raise UnsupportedError(f"{to} cannot hold {quantize!r}; it holds {', '.join(QUANTS[to])}")
    opened = loader.open_checkpoint(
        source, tokenizer, rope_pairing=rope_pairing, rope_theta=rope_theta, norm_eps=norm_eps
    )
    _require_another_file(opened.path, expand_user(path))
    if tokenizer is not None:
        tokenizer = hub.resolve(tokenizer, hub.TOKENIZER_FILES)  # downloaded by now, if it is one of the hub
    notes = list(opened.notes)
    options = _options(opened, to, _name(source, opened), tokenizer, notes)
    types = _types(opened, to, quantize, options.group_size)
    if callable(importance):
        importance = importance()
    matrices = [name for name, weight in opened.weights.items() if len(weight.shape) == 2]
    rows: dict[str, Row] = {}
    with progress.progress_bar(f"writing {to}") as show:

        def report(name: str, before: Weight, after: Weight) -> None:
            error = 0.0 if before.type == after.type else relative_error(before, after)
            rows[name] = Row(name, before.type, after.type, after.nbytes, error)
            show(name, len(rows), len(matrices))

        notes += WRITERS[to](path, opened.config, Converting(opened.weights, types, report, importance), options)
    return Exported(expand_user(path), tuple(rows[name] for name in matrices if name in rows), tuple(notes))


def _require_another_file(source: Path, target: Path) -> None:
    """Raise `Error` if the copy would take the place of the model, or of weights in its directory."""
    if not target.is_file():
        return
    beside = source.is_dir() and target.suffix in _WEIGHTS and os.path.samefile(source, target.parent)
    if beside or os.path.samefile(source, target):
        raise Error(f"{target}: is what is read, and would be lost: write the copy to another file")


def _name(source: str | PathLike[str] | None, opened: Checkpoint) -> str:
    """Name of the model: of its file, its directory, or its repository on the hub, not of a folder in a cache."""
    given = hub.parse(source) if isinstance(source, str) and not os.path.exists(source) else None
    if given is not None:
        return Path(given.file).stem if given.file else given.repository.rpartition("/")[2]
    origin = Path(os.path.abspath(opened.path if source is None else source))  # "." has no name
    return origin.stem if opened.path.is_file() else origin.name


def _types(opened: Checkpoint, to: str, quantize: str | None, group_size: int) -> dict[str, WeightType]:
    """Name → new type, for the matrices to convert."""
    if to in FLOAT_ONLY:
        return {name: F32 for name, weight in opened.weights.items() if len(weight.shape) == 2}
    if to in INT8_ONLY:
        floats = ("tok_embeddings",) if to == "kuiper-int8" else ()
        int8 = WeightType("int8", group_size)
        return {n: F32 if n in floats else int8 for n, weight in opened.weights.items() if len(weight.shape) == 2}
    if quantize is None:
        supported = (*QUANTS[to], *(BLOCKS if to == "gguf" else ()))
        if unknown := [w.type for w in opened.weights.values() if w.type.name not in supported]:
            raise UnsupportedError(
                f"{to} cannot hold weights of type {unknown[0]}: choose one of {', '.join(QUANTS[to])} with dtype="
            )
    return policy.types_to_convert(opened.config, opened.weights, quantize, embeddings=True)


def _options(
    opened: Checkpoint, to: str, name: str, tokenizer_path: str | PathLike[str] | None, notes: list[str]
) -> WriteOptions:
    """The options of the writer. Adds to `notes` what the format cannot hold."""
    if to == "gguf":
        return _gguf_options(opened, name, tokenizer_path, notes)
    tokenizer = opened.tokenizer
    if to == "safetensors":
        eos = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
        files = _tokenizer_files(opened, tokenizer_path)
        texts = {} if tokenizer is None or files else _texts(tokenizer, opened, notes)
        templates, files = _templates(opened, files, texts, notes)
        return WriteOptions(
            bos_id=None if tokenizer is None else tokenizer.bos_id,
            eos_ids=tuple(dict.fromkeys([*opened.stop_token_ids, *eos])),
            token_ids={} if tokenizer is None else _token_ids(tokenizer, opened),
            files=files,
            texts=texts | templates,
        )
    if tokenizer is not None and tokenizer_path is None:
        notes.append(f"{to} files hold no tokenizer: give the one of {opened.path} when opening the copy")
    return WriteOptions(group_size=_group_size(opened)) if to in INT8_ONLY else _DEFAULTS


def _token_ids(tokenizer: Tokenizer, opened: Checkpoint) -> dict[str, int]:
    """Ids of the special tokens that templates see, by name, without BOS and EOS. All have a row of the embedding."""
    wanted = {name: text for name in _NAMED_TOKENS if (text := opened.template_tokens.get(name))}
    rows = min(tokenizer.vocab_size, opened.config.vocab_size)
    texts = set(wanted.values())
    ids = {piece: token for token in reversed(range(rows)) if texts and (piece := tokenizer.piece(token)) in texts}
    return {name: ids[text] for name, text in wanted.items() if text in ids}


def _gguf_options(
    opened: Checkpoint, name: str, tokenizer_path: str | PathLike[str] | None, notes: list[str]
) -> WriteOptions:
    config = opened.config
    if config.qk_norm and (config.qkv_bias or config.o_bias or config.mlp_bias):
        raise UnsupportedError(
            f"{opened.path}: llama.cpp has no architecture with q/k norms and biases, and would not open the file; "
            "safetensors can hold the model"
        )
    rows = config.vocab_size
    vocabulary = _vocabulary(opened, tokenizer_path, notes)
    stops = [token for token in opened.stop_token_ids if vocabulary is not None and token != vocabulary.eos_id]
    stops = [token for token in stops if token < rows]
    if stops[1:]:  # GGUF has one key besides EOS
        notes.append(f"GGUF holds two ids that end a text; left out: {', '.join(map(str, stops[1:]))}")
    metadata: dict[str, MetadataValue] = {"tokenizer.ggml.eot_token_id": stops[0]} if stops else {}
    if vocabulary is not None:
        ids = {piece: token for token, piece in reversed(list(enumerate(vocabulary.pieces)))}
        for key, kind in _TOKEN_KEYS.items():
            text = opened.template_tokens.get(key)  # a vocabulary may have an empty piece
            if text and (token := ids.get(text.encode())) is not None:
                metadata[f"tokenizer.ggml.{kind}_token_id"] = token
    return WriteOptions(
        name=name, vocabulary=vocabulary, chat_templates=_writable(opened.chat_templates, notes), metadata=metadata
    )


def _vocabulary(opened: Checkpoint, tokenizer_path: str | PathLike[str] | None, notes: list[str]) -> Vocabulary | None:
    """The tokenizer for GGUF; None, and a note, if GGUF cannot express it.

    A file of the same tokens beside it is taken if GGUF can express that one: `tokenizer.model` beside a
    `tokenizer.json` with its merges.
    """
    tokenizer, rows = opened.tokenizer, opened.config.vocab_size
    if tokenizer is None:
        return None
    try:
        return _cut(tokenizer.vocabulary(), rows)
    except UnsupportedError as error:
        reason = error
    directory = _tokenizer_directory(opened, tokenizer_path)
    for file in find_tokenizers(directory) if directory is not None else ():
        try:
            other = load_tokenizer(file)
            vocabulary = other.vocabulary()
        except Error:
            continue
        if _same(tokenizer, other):
            notes.append(f"the tokenizer is written from {file.name}, because {reason}")
            bos, eos = (
                own if own is not None else its
                for own, its in ((tokenizer.bos_id, vocabulary.bos_id), (tokenizer.eos_id, vocabulary.eos_id))
            )
            add_bos, add_eos = tokenizer.add_bos, tokenizer.add_eos
            return _cut(replace(vocabulary, bos_id=bos, eos_id=eos, add_bos=add_bos, add_eos=add_eos), rows)
    notes.append(f"the tokenizer is left out: {reason}")
    return None


def _same(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same tokens under the same ids, and split a sample alike."""
    if tokenizer.vocab_size != other.vocab_size:
        return False
    both = ([each.piece(token).replace(SPACE, " ") for token in range(each.vocab_size)] for each in (tokenizer, other))
    return next(both) == next(both) and tokenizer.encode(_SAMPLE, bos=False) == other.encode(_SAMPLE, bos=False)


def _cut(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """The vocabulary without tokens that the embedding has no row for: llama.cpp refuses them."""
    bos, eos, unknown = (
        None if token is None or token >= rows else token
        for token in (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unknown_id)
    )
    return replace(
        vocabulary,
        pieces=vocabulary.pieces[:rows],
        scores=vocabulary.scores[:rows],
        types=vocabulary.types[:rows],
        bos_id=bos,
        eos_id=eos,
        unknown_id=unknown,
    )


def _group_size(opened: Checkpoint) -> int:
    """The int8 group size of the source if it has one, otherwise the largest that divides all rows."""
    groups = {weight.type.group for weight in opened.weights.values() if weight.type.group}
    if len(groups) == 1:
        return groups.pop()
    widths = (opened.config.dim, opened.config.hidden_dim)
    return next((group for group in _GROUPS if not any(width % group for width in widths)), DEFAULT_GROUP)


def _texts(tokenizer: Tokenizer, opened: Checkpoint, notes: list[str]) -> dict[str, str]:
    """Tokenizer files for a Hugging Face directory; none, and a note, if they cannot express this tokenizer."""
    template = opened.chat_template if opened.chat_templates.keys() == {"default"} else None
    try:
        named = {name: tokenizer.piece(token) for name, token in _token_ids(tokenizer, opened).items()}
        texts = tokenizer_texts(tokenizer, template, opened.config.context, named)
    except UnsupportedError as error:
        notes.append(f"the tokenizer is left out: {error}")
        return {}
    if isinstance(tokenizer, BPETokenizer) and (lost := tokenizer.unreachable):
        notes.append(f"tokens {', '.join(map(str, lost[:8]))} have the text of other tokens: left out of the tokenizer")
    return texts


def _tokenizer_directory(opened: Checkpoint, tokenizer_path: str | PathLike[str] | None) -> Path | None:
    """The directory whose files belong to the tokenizer; None for a model whose files may lie beside other models'."""
    if tokenizer_path is not None:
        given = expand_user(tokenizer_path)
        return given if given.is_dir() else given.parent
    if not opened.format.startswith(("Hugging Face", "Meta")):
        return None
    return opened.path if opened.path.is_dir() else opened.path.parent


def _tokenizer_files(opened: Checkpoint, tokenizer_path: str | PathLike[str] | None) -> tuple[Path, ...]:
    """The tokenizer files to copy: those of a directory, or the file that was given and those that belong to it.

    A file that was given comes without other tokenizers of its directory, which readers may prefer to it. Of a
    vocabulary with its merges none are copied: a tokenizer.json that is written says how text is split.
    """
    directory = _tokenizer_directory(opened, tokenizer_path)
    if directory is None:
        return ()
    if (directory / VOCABULARY).is_file() and not any((directory / name).is_file() for name in _TOKENIZERS):
        return ()
    names: tuple[str, ...] = (*_TOKENIZERS, *_SETTINGS)
    if tokenizer_path is not None and not (given := expand_user(tokenizer_path)).is_dir():
        if given.name not in _TOKENIZERS:
            return ()
        names = (given.name, *_SETTINGS)
    return tuple(path for name in names if (path := directory / name).is_file())


def _templates(
    opened: Checkpoint, files: tuple[Path, ...], texts: Mapping[str, str], notes: list[str]
) -> tuple[dict[str, str], tuple[Path, ...]]:
    """Chat templates to write as files of their own, and those of `files` to copy beside them. `texts` are written too.

    The copy gets the templates of the opened model. If it has none, it gets those beside the tokenizer files.
    """
    beside = TextSettings(files[0].parent) if files else None
    found = {} if beside is None else beside.chat_templates
    wanted = opened.chat_templates or found
    if beside is not None and found == wanted and not beside.named_template_files:  # they are in the files to copy
        return {}, files
    if texts and wanted.keys() <= {"default"}:  # it is in the tokenizer_config.json
        return {}, files
    return template_texts(_writable(wanted, notes)), tuple(path for path in files if path.name != DEFAULT_TEMPLATE)


def _writable(templates: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """The chat templates whose names can be names of files and of keys; a note names the others."""
    if lost := [name for name in templates if not _TEMPLATE_NAME.fullmatch(name)]:
        notes.append(f"chat templates with unusual names are left out: {', '.join(ascii(n[:40]) for n in lost[:8])}")
    return {name: text for name, text in templates.items() if name not in lost}
