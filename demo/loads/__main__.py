"""Run one module of this package: ``python -m demo.loads MODULE DIRECTORY``.

Prints ``{"seconds": …, "answer": …}``: what ``use`` answered, and the time from the call of ``load`` to that
answer; the libraries are imported before. Then the model is held, as a service would hold it, until standard
input ends.
"""

from __future__ import annotations

import importlib
import json
import sys
import time


def main(name: str, directory: str) -> None:
    """Load, use, tell, hold."""
    module = importlib.import_module(f"demo.loads.{name}")
    started = time.perf_counter()
    model = module.load(directory)
    answer = module.use(model)
    print(json.dumps({"seconds": time.perf_counter() - started, "answer": answer}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
