"""The layout of GGUF's block types for the GPU, which reads aligned words. The quants' lower four bits go to one matrix
(the payload), everything else to another (the scales). `kernels/repack.py` repacks blocks while a model is uploaded.

Payload: 16 bytes for 32 quants, in the order of q4_0: byte j has quant j in its low half and j + 16 in its high half.
q8_0 has its 32 bytes.

Scales, type by type. What a row's last record, or its last word, lacks is zeros:

- q4_0, q8_0: for each block a float16, d.
- q4_1: for each block a word of two float16, d and m.
- q4_k: a record of 80 bytes for 1024 elements, with the payload 4.625 bits per element. For each 32 elements two bytes,
  their scale and min; then for each 256 a word of two float16, d and dmin.
- q5_k: a record of 208 bytes for 1024 elements, with the payload 5.625 bits per element. First as q4_k; then for each
  32 elements a word with the quants' fifth bits. Those of quants j, j + 4, … j + 28 are in byte j, lowest first.
- q6_k: a record of 168 bytes for 512 elements, with the payload 6.625 bits per element. For each 32 elements 8 bytes
  with the quants' upper two bits; then for each 16 a signed byte, their scale; then for each 256 a word, whose low half
  is the float16 d. The upper bits of quants j, j + 4, j + 8 and j + 12 are in byte j, lowest first; those of j + 16 …
  are in byte j + 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..memory import ceil_div

RUN = 32
"""Elements that a thread repacks: 16 bytes of payload of a type of 4 to 7 bits, 32 of q8_0."""


@dataclass(frozen=True)
class Layout:
    """The scales of a block type in device memory."""

    scales: str
    """Type of an element of the scales' matrix."""
    record: tuple[int, int]
    """(elements of the scales' matrix, elements of the weight) per record. A row's last one may be partly padding."""

    def stride(self, columns: int) -> int:
        """Elements of a row of the scales' matrix, for rows of `columns` elements."""
        elements, covered = self.record
        return ceil_div(columns, covered) * elements


LAYOUTS = {
    "q8_0": Layout("f16", (2, 64)),
    "q4_0": Layout("f16", (2, 64)),
    "q4_1": Layout("u32", (1, 32)),
    "q4_k": Layout("u8", (80, 1024)),
    "q5_k": Layout("u8", (208, 1024)),
    "q6_k": Layout("u8", (168, 512)),
}
PACKED = ("q4_1", "q4_k", "q5_k", "q6_k")
"""Types that kernels tell apart by more than the width of their quants."""
