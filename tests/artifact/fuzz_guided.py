"""As `fuzz.py`, but what is tried next depends on which lines of the reader the last tries reached (libFuzzer).

    pip install atheris
    python tests/artifact/fuzz_guided.py --minutes 20 --keep DIRECTORY

An input is either the sections of a file, or the decisions of one of the mutations of `fuzz.py`: so a single byte decides
which method, which shape, which number comes next, and libFuzzer learns what leads further.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path


class Decisions(random.Random):
    """A source of random numbers that reads them from bytes, and gives zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        """The next k bits."""
        taken = self._data[self._at : self._at + (k + 7) // 8]
        self._at += len(taken)
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """The next byte, as a share."""
        return self.getrandbits(8) / 256


def main() -> None:
    """Run the command; it leaves the process when the time is over."""
    import atheris

    with atheris.instrument_imports(include=["psc_lightning"]):
        import fuzz
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20, help="how long")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="write the shortest file of each kind of answer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, run = fuzz.seeds(), fuzz.Run()
    started = time.monotonic()

    def one(data: bytes) -> None:
        if len(data) > 1:
            mutation = (None, fuzz.forged, fuzz.table_edited, fuzz.invented, fuzz.plain_edited)[data[0] % 5]
            made = mutation(files, Decisions(data[1:])) if mutation else fuzz.sealed(data[1:])
            run.one(mutation.__name__ if mutation else "sections", made)
        if time.monotonic() - started > 60 * options.minutes:
            print(run.summary(), flush=True)
            if options.keep:
                run.keep(options.keep)
            os._exit(int(run.bad > 0))

    with tempfile.TemporaryDirectory() as folder:
        for at, data in enumerate(files):
            (Path(folder) / str(at)).write_bytes(b"\0" + data[8:])
        for mode in (1, 2, 3, 4):
            (Path(folder) / f"mode{mode}").write_bytes(bytes([mode]) + random.Random(mode).randbytes(200))
        atheris.Setup([sys.argv[0], "-max_len=4096", folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
