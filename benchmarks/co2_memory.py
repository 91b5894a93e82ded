"""What memory CO2 and its family add to a worker, in copies of the parameters.

Two processes train 50 million parameters (48 square linear layers) over the loopback by real ``Trainer`` fits with
plain SGD, which has no state, on tiny batches: beside the weights and their gradients there is next to nothing. A fit
goes over several rounds of 3 local steps; all methods run one after the other in the same two processes, each repeat
beside one without communication, whose memory is subtracted.

* ``tensors``: storages of all tensors that Python knows of, in the middle of a round, when no gradients are there.
* ``resident``: the process's resident memory at the same place. It also has what the communication library holds.
* ``peak``: the largest resident memory from the second round to the end of the fit. It also has what an exchange and
  an outer step take for a moment.

A copy is the size of all parameters in float32. DDP's copy is that of its gradient buckets. Target: CO2 as it comes
adds at most 3 copies (anchor, message, and where its round began; or a momentum with variant="paper").
"""

import os
import statistics

from _pair import Pair
from _report import arguments, publish, table, verdict

LAYERS, WIDTH, REPEATS = 48, 1024, 2
ALONE, OURS, TARGET = "no communication", "CO2", 3.0
METHODS = (
    "DDP",
    "LocalSGD",
    "SlowMo",
    "DiLoCo",
    OURS,
    "CO2, paper, momentum 0.5",
    "CO2, corrected, momentum 0.5",
    "CO2, bfloat16 messages",
)
# Resident memory counts whole pages, and allocators keep some of what was freed.
TOLERANCE = 0.05


def main() -> None:
    quick = arguments(__doc__).quick
    layers, width, repeats = (2, 64, 1) if quick else (LAYERS, WIDTH, REPEATS)
    methods = (ALONE, OURS) if quick else (ALONE, *METHODS)
    # Freed memory goes back to the system at once, or resident memory would show what was needed for a moment only.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    added: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
    with Pair() as pair:
        for _ in range(repeats + (not quick)):
            found = {
                method: pair.run("_memory_jobs:fit", method=method, layers=layers, width=width) for method in methods
            }
            for method in methods:
                for kind in ("tensors", "resident", "peak"):
                    pairs = zip(found[method], found[ALONE], strict=True)
                    copies = max((mine[kind] - alone[kind]) / mine["copy"] for mine, alone in pairs)
                    added[method].setdefault(kind, []).append(copies)
    # The first repeat warms up the allocator and the libraries.
    medians = {
        method: {kind: statistics.median(each[0 if quick else 1 :]) for kind, each in kinds.items()}
        for method, kinds in added.items()
    }
    rows = [[method, *(f"{copies:.2f}" for copies in medians[method].values())] for method in methods[1:]]
    ours = medians[OURS]
    # The smoke test's parameters are smaller than the scatter of resident memory.
    met = all(ours[kind] <= TARGET + TOLERANCE for kind in (("tensors",) if quick else ("tensors", "resident")))
    text = (
        f"Added memory of a worker, in copies of the parameters\n\n{table(['method', *ours], rows)}\n\n"
        f"Target: CO2 holds at most {TARGET:.0f} copies more: {ours['tensors']:.2f} in tensors, "
        f"{ours['resident']:.2f} resident ({verdict(met)})."
    )
    settings = {"layers": layers, "width": width, "repeats": repeats}
    publish("co2_memory", text, {"settings": settings, "copies": added, "medians": medians}, quick=quick)


if __name__ == "__main__":
    main()
