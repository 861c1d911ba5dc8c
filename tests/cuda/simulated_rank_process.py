"""The process of a rank above 0 whose GPU is the simulator: as `numballama.parallel.rank_process`."""

from __future__ import annotations

import sys

from tests.cuda.simulator import simulation  # first: it replaces what kernels import
from tests.helpers.cuda_host import install

if __name__ == "__main__":
    install(run=simulation.run, n_sms=2)

    from numballama.parallel.rank_process import main

    main(sys.argv[1:])
