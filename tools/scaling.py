"""A model of synchronous training on many GPUs: what a step costs, and what share of it is useful work.

    python -m tools.scaling --gradient-mb 177 --step-ms 150

A step lasts as long as the slowest of n replicas, and then as long as the part of the gradient's sum that was not
hidden behind the backward pass:

    step(n) = step(1) * (1 + spread * slowest(n)) + max(0, reduce(n) - overlap * step(1))
    slowest(n): the expected largest of n values drawn from the standard normal distribution (Blom 1958)
    reduce(n) = 2 (m - 1) / m * bytes / bandwidth  +  2 (m - 1) * latency * buffers       for a ring of m members

The sum is done within each machine over its own links, then between the machines (m of them) over the network, which
the GPUs of a machine share: as NCCL's rings do. No GPU is needed, and nothing is measured: see NOTES.md.
"""

import argparse
import math
from statistics import NormalDist

from tabulate import tabulate

NETWORKS = {  # name: bytes per second of a machine, seconds of latency per hop
    "10 Gb/s Ethernet (TCP)": (1.25e9 * 0.8, 50e-6),
    "25 Gb/s Ethernet (TCP)": (3.125e9 * 0.8, 50e-6),
    "100 Gb/s EFA": (12.5e9 * 0.8, 25e-6),
    "400 Gb/s EFA or InfiniBand": (50e9 * 0.8, 15e-6),
}
GPUS_PER_MACHINE = 8
MACHINE_BANDWIDTH, MACHINE_LATENCY = 100e9, 5e-6  # of the links between a machine's GPUs, each
BUFFER_BYTES = 64e6  # Horovod's fusion buffer
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def ring_seconds(members, num_bytes, bandwidth, latency):
    """Time of a ring all-reduce (Patarasuk and Yuan 2009): every byte is sent twice, less one member's share."""
    buffers = math.ceil(num_bytes / BUFFER_BYTES)
    return 2 * (members - 1) * (num_bytes / members / bandwidth + latency * buffers)


def slowest(n):
    """Expected largest of n standard normal values, Blom's approximation; 0 for one."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def step_seconds(gpus, *, num_bytes, single, overlap, spread, bandwidth, latency):
    """Time of a step: see the top. `single`: seconds of a step on one GPU."""
    machines = math.ceil(gpus / GPUS_PER_MACHINE)
    reduce = ring_seconds(min(gpus, GPUS_PER_MACHINE), num_bytes, MACHINE_BANDWIDTH, MACHINE_LATENCY)
    reduce += ring_seconds(machines, num_bytes, bandwidth, latency)
    return single * (1 + spread * slowest(gpus)) + max(0.0, reduce - overlap * single)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient-mb", type=float, default=177.0, help="float32, Mask R-CNN R50-FPN: %(default)s")
    parser.add_argument("--step-ms", type=float, default=150.0, help="a step on one GPU (%(default)s)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of it that can hide the sum (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.08, help="deviation of step times, relative (%(default)s)")
    arguments = parser.parse_args()
    rows = []
    for name, (bandwidth, latency) in NETWORKS.items():
        single = arguments.step_ms / 1000
        options = dict(num_bytes=arguments.gradient_mb * 1e6, single=single, bandwidth=bandwidth, latency=latency)
        times = [step_seconds(n, overlap=arguments.overlap, spread=arguments.spread, **options) for n in SIZES]
        rows.append([name, *(f"{1000 * time:.0f} ms, {single / time:.0%}" for time in times)])
    print(tabulate(rows, ["network between machines of 8", *map(str, SIZES)], tablefmt="github"))


if __name__ == "__main__":
    main()
