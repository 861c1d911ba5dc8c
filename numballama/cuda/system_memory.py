"""Loads and stores that other devices and the host see, and see in order: scope `.sys` of PTX's memory model.

`relaxed`: the access itself is whole and is seen at once, and orders nothing else. A pair of 64-bit words is two such
accesses. `release` and `acquire`: who sees the stored number has all that was written before it.

Functions are named after PTX (PTX ISA, "Memory Consistency Model"). Addresses are global, of this device or another.
"""

from __future__ import annotations

from .lowering import instruction, load

ld_relaxed_u32 = load("ld.relaxed.sys.global.u32 $0, [$1];", "r")
"""ld_relaxed_u32(address)"""

ld_acquire_u32 = load("ld.acquire.sys.global.u32 $0, [$1];", "r")
"""ld_acquire_u32(address): what was written before the number that is seen is seen too."""

st_release_u32 = instruction("st.release.sys.global.u32 [$0], $1;", "lr")
"""st_release_u32(address, number): after all that this thread has written, or has seen at a barrier of the block."""

st_relaxed_u32 = instruction("st.relaxed.sys.global.u32 [$0], $1;", "lr")
"""st_relaxed_u32(address, number)"""

st_relaxed_v4_u32 = instruction("st.relaxed.sys.global.v4.u32 [$0], {$1, $2, $3, $4};", "lrrrr")
"""st_relaxed_v4_u32(address, four numbers): each of them whole. The address is a multiple of 16."""

st_relaxed_u64 = instruction("st.relaxed.sys.global.u64 [$0], $1;", "ll")
"""st_relaxed_u64(address, word)"""

st_relaxed_v2_u64 = instruction("st.relaxed.sys.global.v2.u64 [$0], {$1, $2};", "lll")
"""st_relaxed_v2_u64(address, word, next word): each of them whole. The address is a multiple of 16."""

st_v4_u32 = instruction("st.global.v4.u32 [$0], {$1, $2, $3, $4};", "lrrrr")
"""st_v4_u32(address, four words): a plain store, of which others know after a release."""

ld_relaxed_u64 = load("ld.relaxed.sys.global.u64 $0, [$1];", "l")
"""ld_relaxed_u64(address): a word as an int64."""

ld_relaxed_v2_u64 = load("ld.relaxed.sys.global.v2.u64 {$0, $1}, [$2];", "l", 2)
"""ld_relaxed_v2_u64(address): two words as int64, each of them whole."""

ld_relaxed_v4_f32 = load("ld.relaxed.sys.global.v4.f32 {$0, $1, $2, $3}, [$4];", "f", 4)
"""ld_relaxed_v4_f32(address): four float32 that others have written, never old ones from this SM's cache."""

nanosleep = instruction("nanosleep.u32 $0;", "r")
"""nanosleep(nanoseconds): pause, up to twice as long, between two looks at what others write."""
