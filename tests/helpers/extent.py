"""How much the tests try: with NUMBALLAMA_TEST_ALL=1 every combination, by default samples of the large products."""

from __future__ import annotations

import os

EVERYTHING = os.environ.get("NUMBALLAMA_TEST_ALL") == "1"
