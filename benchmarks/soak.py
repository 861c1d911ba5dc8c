"""Send thousands of short requests through an engine and print memory now and then: it must stay flat.

python benchmarks/soak.py [--device cuda] [--requests 10000] [--out FILE.json]

The packaged story model; prompts of 1 to 40 random tokens, 1 to 16 tokens each, greedy or seeded, 48 at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import numballama
from numballama.bench.benchmark import machine
from numballama.files import atomic_write
from numballama.sampling import SamplingParams

TOGETHER, EVERY = 48, 1000


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng, rows, open_requests = np.random.default_rng(0), [], []
    with numballama.compile(None, device=args.device, max_sequences=32) as model:
        start = time.perf_counter()
        for number in range(args.requests):
            prompt = rng.integers(0, model.config.vocab_size, rng.integers(1, 41)).tolist()
            temperature = float(rng.integers(0, 2))
            params = SamplingParams(temperature=temperature, seed=number, max_tokens=int(rng.integers(1, 17)))
            open_requests.append(model.token_engine.submit(prompt, params))
            if len(open_requests) == TOGETHER:
                for _ in open_requests.pop(0):
                    pass
            if (number + 1) % EVERY == 0:
                device: Any = getattr(model.backend, "device", None)
                used = device.total_bytes - device.free_bytes if args.device.startswith("cuda") else 0
                rows.append({"requests": number + 1, "resident_bytes": resident_bytes(), "device_bytes": used})
                print(rows[-1], flush=True)
        for request in open_requests:
            for _ in request:
                pass
        seconds = time.perf_counter() - start
    if args.out:
        found = {"what": "short requests", "machine": machine(), "seconds": seconds, "memory": rows}
        with atomic_write(args.out) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
