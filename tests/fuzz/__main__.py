"""A long fuzz of one decoder: `python -m tests.fuzz --decoder job --inputs 1000000 --seed 1`; ends with 1 if it found something.

`--first N` goes on where an earlier slice ended; `--only N` runs one input again, outside of every guard.
"""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.decoders import DECODERS
from tests.fuzz.fuzzer import fuzz, report


def main() -> int:
    """Fuzz one decoder, or all of them one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--decoder", choices=[*DECODERS, "all"], required=True)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="number of the one input")
    options = parser.parse_args()
    names = list(DECODERS) if options.decoder == "all" else [options.decoder]
    bad = False
    for name in names:
        decoder = DECODERS[name](options.seed)
        try:
            if options.only is not None:
                given = decoder.input(options.only)
                _say(repr(given))
                _say(decoder.decode(given))
                continue
            found = fuzz(decoder, options.inputs, first=options.first, say=_say)
            _say(report(name, options.seed, found))
            bad = bad or bool(found.problems)
        finally:
            decoder.close()
    return 1 if bad else 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
