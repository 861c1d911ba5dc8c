"""Checks of CUDA programs and kernels that run on a GPU (`test_backend.py`) as well as in the simulator.

The check of a step against the reference is `tests.helpers.bounds`', as for the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np

from numballama.checkpoint import Weight
from numballama.config import ModelConfig
from numballama.cpu.sampling import keep_min_p, keep_top_k, keep_top_p
from numballama.cuda import backend as cuda
from numballama.cuda.kernels.params import RECORD_BYTES
from numballama.cuda.launch import ITEM_BYTES, Array, Launch, LaunchContext
from numballama.cuda.ops import sampling
from numballama.cuda.sampler_table import DeviceSampled, DeviceSamplerTable
from numballama.graph import PAGE_TABLE, KVLayout
from numballama.ir import DTYPES
from numballama.quantization.convert import dequantize, quantize_int8
from numballama.quantization.types import BLOCKS
from numballama.reference import ReferenceBackend
from numballama.registry import find
from numballama.sampling import (
    GOLDEN,
    MIN_P,
    REPEAT_WINDOW,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Sampled,
    SamplerTable,
    SamplingParams,
)
from tests.helpers.bounds import BOUNDS, U, check_step, read
from tests.helpers.cuda_host import converted, graph_of
from tests.helpers.paging import give_pages
from tests.helpers.random_models import random_checkpoint
from tests.helpers.sampling import (
    changed_logits,
    likeliest,
    log_softmax,
    make_sampler,
    mask_of,
)

SHARE = 1e-3
"""Largest difference of two float32 computations of a whole model, as a fraction of the largest element."""


# Programs


class Pair:
    """The CUDA backend and the reference over one random model."""

    def __init__(
        self, config: ModelConfig, kind: str = "f32", kv: str = "f32", seed: int = 0, group: int = 32,
        sequences: int = 1, int8_activations: bool = False, scale: float = 1.0, context: int | None = None,
        page: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.int8 = config, int8_activations
        checkpoint = random_checkpoint(config, seed)
        for weight in checkpoint.weights.values():
            weight.data[...] *= np.float32(scale if len(weight.shape) == 2 else 1)
        self.weights = converted(checkpoint.weights, kind, group)
        self.context = context or config.context
        self.kv = KVLayout.of(config, self.context, kv, sequences, page=page or (4 if self.context <= 64 else 32))
        self.cuda, self.reference = cuda.CudaBackend(self.weights), ReferenceBackend(self.weights)
        self.floats = kv == "f32" and not int8_activations

    def graph(self, tokens: int, logits: str = "rows") -> Any:
        return graph_of(self.config, self.weights, self.kv, tokens, logits, self.int8)

    def programs(self, tokens: int, logits: str = "rows", fusions: bool | Sequence[str] = True) -> tuple[Any, Any]:
        graph = self.graph(tokens, logits)
        made = self.cuda.program(graph, fusions), self.reference.program(graph)
        for backend in (self.cuda, self.reference):
            self.table = give_pages(backend, self.kv, seed=5)
        return made

    def of_sequence(self, cache: np.ndarray, sequence: int, length: int) -> np.ndarray:
        """A sequence's first `length` keys or values, [length, heads, head_dim], from a cache in pages."""
        where = np.arange(length)
        return cache[self.table[sequence, where // self.kv.page], :, where % self.kv.page]

    def ids(self, seed: int, count: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [int(token) for token in rng.integers(0, self.config.vocab_size, count)]

    def close(self) -> None:
        self.cuda.close()


def feed(program: Any, ids: Sequence[int], start: int, sequence: int = 0) -> None:
    program.inputs["ids"][: len(ids)] = ids
    program.inputs["positions"][: len(ids)] = range(start, start + len(ids))
    program.inputs["sequences"][: len(ids)] = sequence
    if "rows" in program.inputs:
        program.inputs["rows"][0] = len(ids) - 1


def arena(program: Any) -> np.ndarray:
    """A copy of the arena's bytes."""
    out = np.empty(program.plan.arena_bytes, np.uint8)
    program.backend.device.make_current()
    program.backend.device.read(program.arena.address, out)
    return out


def poison(program: Any) -> None:
    """Fill the arena and the KV cache with 0xFF, not the page table: every float there is a NaN."""
    device = program.backend.device
    device.make_current()
    device.fill(program.arena.address, 0xFF, program.plan.arena_bytes)
    for name, state in program.backend.states.items():
        if name != PAGE_TABLE:
            device.fill(state.address, 0xFF, state.nbytes)
    device.synchronize()


def poison_dead(program: Any, step: int) -> np.ndarray:
    """Fill all memory with 0xFF, except values that are computed before `step` and needed in it or later.

    Returns which bytes of the arena `step` may write.
    """
    dead, own = np.ones(program.plan.arena_bytes, bool), np.zeros(program.plan.arena_bytes, bool)
    for place in program.plan.placements.values():
        where = slice(place.offset, place.offset + place.nbytes)
        if place.first < step <= place.last:
            dead[where] = False
        elif place.first == step:
            own[where] = True
    device = program.backend.device
    edges = np.flatnonzero(np.diff(np.concatenate([[False], dead, [False]])))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        device.fill(program.arena.address + int(first), 0xFF, int(last - first))
    device.synchronize()
    return own


def run_checked(
    pair: Pair, program: Any, reference: Any, ids: Sequence[int], start: int, sequence: int, whole: bool
) -> None:
    """One run, step by step: each op on the operands as the device has them, within the bounds of rounding; no other
    byte of the arena changes. With `whole` every value is also compared with the reference's own run.
    """
    tokens, graph = len(ids), program.plan.graph
    feed(program, ids, start, sequence)
    program.backend.device.make_current()
    program.run_inputs.send(tokens, 1)  # a run does; the first step's operands are compared before it
    if whole:
        feed(reference, ids, start, sequence)
        reference.run(tokens)
    for step, planned in enumerate(program.plan.steps):
        own = poison_dead(program, step)
        before = arena(program)
        with bounds_of(reference.backend):
            check_step(
                program, step, tokens, reference.backend, lambda step=step: program.run(tokens, step, step + 1), rows=1
            )
        np.testing.assert_array_equal(arena(program)[~own], before[~own], err_msg=f"step {step} wrote to others' bytes")
        for name in planned.op.outputs if whole else ():
            got, want = read(program, name, 1 if planned.of_rows else tokens), reference.values[name]
            if graph.values[name].dtype == "i32":
                continue  # argmax chooses among near equals; the op itself was compared above
            if graph.values[name].kind == "state":
                got, want = (pair.of_sequence(cache, sequence, start + tokens) for cache in (got, want))
            masked = np.isneginf(want)
            np.testing.assert_array_equal(np.isneginf(got), masked, err_msg=name)
            close(got[~masked], want[~masked], f"step {step} {planned.op.kind}: {name}")


def close(got: np.ndarray, want: np.ndarray, what: str, share: float = SHARE) -> None:
    """Assert that arrays differ by at most `share` of the largest element."""
    largest, difference = np.abs(want).max(), np.abs(got - want).max()
    assert difference <= share * largest + 1e-6, f"{what} off by {difference / largest}"


def check_runs(
    pair: Pair, counts: Sequence[int], chunk: int, fusions: bool | Sequence[str], logits: str = "rows"
) -> None:
    """Prefill and decoding of every sequence, step by step: `counts` tokens per run, 1 by the decode program."""
    prefill, decode = pair.programs(chunk, logits, fusions), pair.programs(1, "rows", fusions)
    poison(prefill[0])
    poison(decode[0])
    for sequence in range(pair.kv.slots):
        start = 0
        for turn, count in enumerate(counts):
            count = min(count, pair.context - start)
            if count > 0:
                programs = decode if count == 1 and turn else prefill
                run_checked(pair, *programs, pair.ids(turn, count), start, sequence, pair.floats)
                start += count


def check_whole_runs(
    pair: Pair, counts: Sequence[int], chunk: int, fusions: bool | Sequence[str], share: float = SHARE
) -> None:
    """The same runs, each as one launch of a graph, in which kernels overlap: the logits of all their tokens."""
    prefill, decode = pair.programs(chunk, "all", fusions), pair.programs(1, "rows", fusions)
    poison(prefill[0])
    poison(decode[0])
    start = 0
    for turn, count in enumerate(counts):
        program, reference = decode if count == 1 and turn else prefill
        ids = pair.ids(turn, count)
        for each in (program, reference):
            feed(each, ids, start)
            each.run(count)
        close(read(program, "logits", count), reference.value("logits"), f"logits of run {turn}", share)
        start += count


# Single kernels


class Bench:
    """Runs single operators: arrays in device memory, and launches without a model."""

    def __init__(self) -> None:
        self.backend = cuda.CudaBackend({})
        self.device = self.backend.device
        self._keep: list[Any] = []
        self.ctx = LaunchContext(
            self.device.n_sms, self.device.shared_limit, self.put(np.array([1], np.int32)),
            self.put(np.zeros((2, 2), np.int32)), self._zeros,
        )  # fmt: skip

    def _zeros(self, count: int) -> Array:
        return self.put(np.zeros(count, np.int32))

    def put(self, numbers: np.ndarray, dtype: str | None = None) -> Array:
        """Copy an array to device memory, with bytes 0xFF after it."""
        numbers = np.ascontiguousarray(numbers)
        dtype = dtype or {"float32": "f32", "int32": "i32", "int64": "i64", "float64": "f64", "uint64": "u64",
                          "int8": "i8"}[numbers.dtype.name]  # fmt: skip
        memory = cuda.Memory(self.device, numbers.nbytes + 256, "a test")
        self._keep.append(memory)
        self.device.fill(memory.address, 0xFF, numbers.nbytes + 256)
        self.device.write(memory.address, numbers.ctypes.data, numbers.nbytes)
        self.device.synchronize()
        return memory.array(0, numbers.shape, dtype)

    def get(self, array: Array) -> np.ndarray:
        names = {"i64": np.dtype(np.int64), "f64": np.dtype(np.float64), "u64": np.dtype(np.uint64)}
        dtype = (DTYPES | names)[array.dtype]
        assert dtype.itemsize == ITEM_BYTES[array.dtype]
        out = np.empty(array.shape, dtype)
        self.device.read(array.address, out)
        return out

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An array of NaN, or of -1 for integers."""
        return self._shaped(self.put(np.full(int(np.prod(shape)) * ITEM_BYTES[dtype], 0xFF, np.uint8), dtype), shape)

    @staticmethod
    def _shaped(array: Array, shape: tuple[int, ...]) -> Array:
        return Array(array.address, shape, array.dtype)

    def run(self, op: str, types: Sequence[str], *operands: Any, **attrs: Any) -> None:
        """Launch the kernel that the registry has for an op, with scratch arrays of its own."""
        kernel = find(op, "cuda", types)
        shapes = [operand.shape for operand in operands[: len(types)]]
        named = {
            name: self.empty(tuple(shape(*shapes, workers=self.ctx.n_sms)), "f32")
            for name, shape in kernel.scratch.items()
        }
        self.execute(kernel.function(self.ctx, *operands, **named, **attrs))

    def execute(self, launches: Sequence[Launch]) -> None:
        """Compile launches and run them, one after the other."""
        (prepared,) = self.backend.prepare_launches([launches])
        for launch in prepared:
            launch()
        self.device.synchronize()

    def close(self) -> None:
        self.backend.close()
        for memory in self._keep:
            memory.free()


def check_argmax(bench: Bench, x: np.ndarray) -> None:
    """The operator returns the first index of each row's largest element, -1 for a row with a NaN."""
    out = bench.empty(x.shape[:1], "i32")
    bench.device.write(bench.ctx.tokens.address, np.array([len(x)], np.int32).ctypes.data, 4)
    bench.run("argmax", ["f32"], bench.put(x), out)
    np.testing.assert_array_equal(bench.get(out), np.where(np.isnan(x).any(axis=1), -1, x.argmax(axis=1)))


# Sampling


class Slots:
    """A `SamplerTable` in device memory, and launches that sample for its slots."""

    def __init__(self, bench: Bench, table: SamplerTable, rows: int) -> None:
        self.bench, self.table = bench, table
        self.device = DeviceSamplerTable(bench.device, table.slots, table.vocab_size)
        self.sampled = DeviceSampled(bench.device, rows)
        bench._keep += [self.device, self.sampled.memory]

    def sample(self, logits: np.ndarray, slots: Sequence[int], rows: int | None = None) -> Sampled:
        """Sample for rows of logits, of which the first `rows` are used. The host's table is not changed."""
        bench, table, used = self.bench, self.table, len(slots) if rows is None else rows
        real = [slot for slot in slots[:used] if slot < table.slots]
        self.device.update(table, real)
        count, which = bench.put(np.array([used], np.int32)), bench.put(np.array(slots, np.int32))
        top, on_device = table.top_logprobs(real), bench.put(logits.astype(np.float32))
        arrays = self.device.arrays, self.sampled.arrays
        bench.execute(sampling.sample(count, on_device, which, *arrays, logprobs=top >= 0))
        return self.sampled.read(used, top)

    def state(self) -> dict[str, np.ndarray]:
        """What kernels have changed: counts, generated, state and recent of each slot, and the latest tokens."""
        count = self.table.slots
        out = {"last_token": self.bench.get(self.device.arrays["last_token"])}
        records = np.zeros(count * RECORD_BYTES, np.uint8)
        self.bench.device.read(self.device.arrays["settings"].address, records)
        records = records.reshape(count, RECORD_BYTES)
        fields = {"counts": (128, 8, np.int64), "generated": (136, 8, np.int64), "state": (144, 8, np.uint64)}
        for name, (place, nbytes, dtype) in fields.items():
            out[name] = np.ascontiguousarray(records[:, place : place + nbytes]).view(dtype)[:, 0]
        return out | {"recent": np.ascontiguousarray(records[:, 256:512]).view(np.int32)}


def draw(bench: Bench, logits: np.ndarray, sampler: SamplerTable, times: int = 1) -> tuple[list[int], SamplerTable]:
    """Tokens that the device draws, one after the other, from the same logits; `sampler` holds its state afterwards."""
    slots, tokens = Slots(bench, sampler, 1), []
    for _ in range(times):
        tokens.append(int(slots.sample(logits.reshape(1, -1), [0]).tokens[0]))
    for name, array in slots.state().items():
        getattr(sampler, name)[...] = array
    return tokens, sampler


def candidates(logits: np.ndarray, sampler: SamplerTable) -> set[int]:
    """Tokens that the CPU sampler's filters keep, for logits after the penalties."""
    ids = np.arange(sampler.n_candidates, dtype=np.int32)
    top_k, top_p, min_p = sampler.settings[0, [TOP_K, TOP_P, MIN_P]]
    n = len(ids)
    if top_k > 0:
        n = keep_top_k(logits, ids, n, int(top_k))
    n = keep_top_p(logits, ids, n, top_p)
    n = keep_min_p(logits, ids, n, min_p)
    return {int(token) for token in ids[:n]}


def splitmix64(z: np.ndarray) -> np.ndarray:
    """Output function of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def gumbel(state: int, n: int) -> np.ndarray:
    """Gumbel noise of each of n tokens for a state of the generator, in float64."""
    with np.errstate(over="ignore"):
        bits = splitmix64(
            splitmix64(np.uint64(state)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        )
    u = ((bits >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23
    return -np.log(-np.log(u))


def penalised(logits: np.ndarray, sampler: SamplerTable) -> np.ndarray:
    """Logits after the repetition penalty."""
    out = logits.astype(np.float32).copy()
    penalty = np.float32(sampler.settings[0, REPETITION_PENALTY])
    for token in {int(t) for t in sampler.recent[0, : min(int(sampler.counts[0]), REPEAT_WINDOW)]}:
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


def expected(logits: np.ndarray, sampler: SamplerTable) -> tuple[int, float]:
    """(token chosen by the noise of slot 0's state, its lead over the next); -1 if the logits hold NaN."""
    return expected_of(penalised(logits, sampler), sampler)


def expected_of(changed: np.ndarray, sampler: SamplerTable) -> tuple[int, float]:
    """The same, of logits after the penalties."""
    n, temperature = sampler.n_candidates, sampler.settings[0, TEMPERATURE]
    changed = changed[:n]
    if np.isnan(changed).any() or (np.isposinf(changed).any() and temperature > 0):
        return -1, np.inf
    if temperature == 0:
        return int(changed.argmax()), np.inf
    kept = sorted(candidates(changed, sampler))
    scores = changed[kept] / temperature + gumbel(int(sampler.state[0]), n)[kept]
    order = np.argsort(-scores, kind="stable")
    lead = scores[order[0]] - scores[order[1]] if len(order) > 1 else np.inf
    return kept[int(order[0])], float(lead)


def check_draws(bench: Bench, logits: np.ndarray, times: int = 1, **settings: Any) -> None:
    """Draws of the device are those of the formula: the largest logit / temperature + noise among the candidates.

    A lead below 1e-4 may go either way: it is float32 against float64.
    """
    sampler = make_sampler(len(logits), **settings)
    for _ in range(times):
        want, lead = expected(logits, sampler)
        before = int(sampler.counts[0]), int(sampler.state[0])
        (token,), sampler = draw(bench, logits, sampler)
        assert token == want or lead < 1e-4, f"{settings}: {token}, not {want}, which leads by {lead}"
        assert int(sampler.counts[0]) == before[0] + (token >= 0)
        moved = token >= 0 and sampler.settings[0, TEMPERATURE] > 0
        assert int(sampler.state[0]) == (before[1] + (GOLDEN if moved else 0)) % 2**64
        if token >= 0:
            assert sampler.recent[0, before[0] % REPEAT_WINDOW] == token == sampler.last_token[0]


ROW_SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 0, "top_p": 0.9, "logprobs": 0},
    {"temperature": 0, "logprobs": 3, "repetition_penalty": 1.5},
    {"seed": 3, "top_k": 0, "top_p": 1.0, "temperature": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {1: 9.0, 3: -100.0}, "min_tokens": 3, "logprobs": 20},
    {"seed": 4, "top_k": 5, "top_p": 1.0, "min_p": 0.05, "logit_bias": {2: 2.5}, "frequency_penalty": -1.0,
     "repetition_penalty": 1.2, "min_tokens": 2, "logprobs": 1},
]  # fmt: skip
"""Settings of slots, all of which one run mixes. Filters are none for which a bin of the histogram decides."""
PROMPT, OUTPUT = [1, 2, 3, 2], [3, 5, 3]


def check_rows(bench: Bench, vocab: int, steps: int, seed: int = 0, rows: int | None = None) -> None:
    """Rows of `ROW_SETTINGS` mixed, a few steps of each: by their definitions, and equal to each row alone."""
    rng = np.random.default_rng(seed)
    count = len(ROW_SETTINGS)
    settings = [SamplingParams(**{"seed": slot, **ROW_SETTINGS[slot % count]}) for slot in range(rows or count)]
    table = SamplerTable(len(settings), vocab, vocab - 1)
    masks = {slot: rng.random(vocab) < 0.7 for slot in range(0, len(settings), 3)}
    outputs: list[list[int]] = [list(OUTPUT) for _ in settings]
    stops = [7, 9, 1]
    for slot, params in enumerate(settings):
        table.assign(slot, params, PROMPT, OUTPUT[: slot % 4], stops)
        outputs[slot] = OUTPUT[: slot % 4]
        if slot in masks:
            table.set_mask(slot, mask_of(masks[slot]))
    order = [int(slot) for slot in rng.permutation(len(settings))]
    slots = [*order[: len(order) // 2], table.slots, *order[len(order) // 2 :], 0]  # padding; a row that is not used
    mixed = Slots(bench, table, len(slots))
    for step in range(steps):
        logits = (rng.standard_normal((len(slots), vocab)) * 3).astype(np.float32)
        logits[:, 2] = logits[:, 6]
        if step == steps - 1:
            logits[1, vocab // 2] = np.nan
        result = mixed.sample(logits, slots, len(slots) - 1)
        for row, slot in enumerate(slots[:-1]):
            if slot == table.slots:
                continue
            params, output = settings[slot], outputs[slot]
            alone = SamplerTable(1, vocab, vocab - 1)
            alone.assign(0, params, PROMPT, output, stops)
            if slot in masks:
                alone.set_mask(0, mask_of(masks[slot]))
            single = Slots(bench, alone, 1).sample(logits[row : row + 1], [0])
            token, n = int(result.tokens[row]), vocab - 1
            assert single.tokens[0] == token, (step, row, slot)
            np.testing.assert_array_equal(single.logprobs[0], result.logprobs[row])
            width = single.top_ids.shape[1]
            np.testing.assert_array_equal(single.top_ids[0], result.top_ids[row, :width])
            np.testing.assert_array_equal(single.top_logprobs[0], result.top_logprobs[row, :width])
            allowed = masks[slot][:n] if slot in masks else None
            changed = changed_logits(logits[row, :n], params, PROMPT, output, stops, allowed)
            want, lead = expected_of(changed.astype(np.float32), alone)
            assert token == want or lead < 1e-4 or not np.isfinite(changed.max()), (step, row, slot, token, want)
            if params.logprobs is not None:
                raw = logits[row, :n]
                top = min(params.logprobs, n) if not np.isnan(raw).any() else 0
                assert result.top_ids[row].tolist() == likeliest(raw, top) + [-1] * (result.top_ids.shape[1] - top)
                logprobs = log_softmax(raw)
                np.testing.assert_allclose(
                    result.top_logprobs[row, :top], logprobs[result.top_ids[row, :top]], atol=2e-5
                )
                if token >= 0:
                    np.testing.assert_allclose(result.logprobs[row], logprobs[token], atol=2e-5)
            if token >= 0:
                output.append(token)
    state = mixed.state()
    for slot, params in enumerate(settings):
        followed = SamplerTable(1, vocab, vocab - 1)
        followed.assign(0, params, PROMPT, OUTPUT[: slot % 4], stops)
        for token in outputs[slot][slot % 4 :]:
            followed.accept(0, token)
        for name, array in state.items():
            np.testing.assert_array_equal(array[slot], getattr(followed, name)[0], err_msg=f"{name} of slot {slot}")


def check_top_k(bench: Bench, logits: np.ndarray, top_k: int, draws: int) -> None:
    """Top-k keeps the k largest, of equals the first: checked with noise that would choose a token after them."""
    kept = np.lexsort((np.arange(len(logits)), -logits))[:top_k]
    inside = np.isin(np.arange(len(logits)), kept)
    for seed in range(2000):
        scores = logits / 50 + gumbel(seed, len(logits))
        best, second = scores[kept][np.argsort(-scores[kept])[:2]]
        if inside[scores.argmax()] or best - second < 1e-3:
            continue
        (token,), _ = draw(bench, logits, make_sampler(len(logits), 50.0, top_k, top_p=1.0, seed=seed))
        assert token == kept[scores[kept].argmax()], (token, top_k, seed)
        draws -= 1
        if not draws:
            return
    raise AssertionError("no seed chooses what top-k leaves out")


def check_quantize(bench: Bench, x: np.ndarray, group: int) -> None:
    """Groups of finite numbers as llama2.c's runq quantises them; a NaN or infinity in one makes its scale NaN."""
    groups = -(-x.shape[1] // group)
    q, scales = bench.empty(x.shape, "i8"), bench.empty((len(x), groups), "f32")
    bench.device.write(bench.ctx.tokens.address, np.array([len(x)], np.int32).ctypes.data, 4)
    bench.run("quantize", ["f32"], bench.put(x), q, scales, group=group)
    got, got_scales = bench.get(q), bench.get(scales)
    for row in range(len(x)):
        for g in range(groups):
            where = slice(g * group, min((g + 1) * group, x.shape[1]))
            if not np.isfinite(x[row, where]).all():
                assert np.isnan(got_scales[row, g])
                continue
            want, want_scale = quantize_int8(np.ascontiguousarray(x[row, where]), group)
            assert abs(got_scales[row, g] - want_scale[0]) <= 2.0**-23 * want_scale[0] + 2.0**-149
            ratio = np.abs(np.divide(x[row, where].astype(np.float64), want_scale[0]) if want_scale[0] else 0 * want)
            tie = np.abs(ratio - np.floor(ratio) - 0.5) <= 1e-5
            assert (np.abs(got[row, where].astype(int) - want) <= tie).all(), (row, g)


# Bounds


QUANTISED = ("int8", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
LEAST = ("q4_1", "q4_k", "q5_k")
"""Types with a minimum: an element is scale · quant + min, with the factors of both at the beginning of a block."""


def magnitudes(weight: Weight) -> np.ndarray:
    """|scale · integer| + |min| of each element."""
    _, nbytes = BLOCKS[weight.type.name]
    blocks = weight.data.reshape(-1, nbytes).copy()
    blocks[:, 1] &= 0x7F
    blocks[:, 3] = blocks[:, 3] & 0x7F | (0x80 if weight.type.name != "q4_1" else 0)  # there it is taken off
    positive = dequantize(Weight(weight.shape, weight.type, blocks.reshape(weight.data.shape)))
    return positive.astype(np.float64)


@contextlib.contextmanager
def bounds_of(reference: ReferenceBackend) -> Iterator[None]:
    """Bounds of rounding errors for CUDA kernels, and for those that multiply the reference's weights.

    An exponential is a power of two, whose exponent is rounded when it is multiplied by log2(e): a relative error of
    the result that grows with the exponent. With quantised weights x is in fixed point (`cuda/kernels/dot.py`): a
    number is off by 2^-24 of the largest of those that one lane multiplies, 16 or 32 neighbours, or of 1e-31 if that is
    more. Elements that are scale · quant + min are multiplied in two sums, each of which is rounded.
    """
    weights = reference.weights
    parts = {name: magnitudes(weight) for name, weight in weights.items() if weight.type.name in LEAST}
    by_array = {id(reference.weight(name)): array for name, array in parts.items()}  # it keeps them
    plain, plain_swiglu, plain_softmax = BOUNDS["linear"], BOUNDS["swiglu"], BOUNDS["softmax"]

    def swiglu(x: Sequence[np.ndarray], e: Sequence[np.ndarray], out: np.ndarray, attrs: Mapping[str, Any]) -> Any:
        return plain_swiglu(x, e, out, attrs) + 2 * U * np.abs(x[0]) * np.abs(out)

    def softmax(x: Sequence[np.ndarray], e: Sequence[np.ndarray], out: np.ndarray, attrs: Mapping[str, Any]) -> Any:
        below = np.where(np.isfinite(x[0]), x[0].max(axis=-1, keepdims=True) - x[0], 0)
        return plain_softmax(x, e, out, attrs) + U * below.max(axis=-1, keepdims=True) * out

    def linear(x: Sequence[np.ndarray], e: Sequence[np.ndarray], out: np.ndarray, attrs: Mapping[str, Any]) -> Any:
        error = plain(x, e, out, attrs)
        if len(x) == 3:
            return error
        a, w = np.abs(x[0].astype(np.float64)), np.abs(x[-1].astype(np.float64))
        starts = np.arange(0, a.shape[1], 32)
        largest = np.repeat(np.maximum.reduceat(a, starts, axis=1), 32, axis=1)[:, : a.shape[1]]
        if id(x[-1]) in by_array:
            error += 8 * U * a @ by_array[id(x[-1])].T
        return error + 1.01 * U * np.maximum(largest, 1e-31) @ w.T

    quantised = any(weight.type.name in QUANTISED for weight in weights.values())
    changed = {"swiglu": swiglu, "softmax": softmax} | ({"linear": linear} if quantised else {})
    with mock.patch.dict(BOUNDS, changed):
        yield
