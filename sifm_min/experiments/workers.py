"""The processes that share a run: shares of the pictures, helper processes, and the order of large editors."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from ..files.ledger import Busy
from ..files.ranks import rank
from .plan import editing

PACKAGE = __package__.rpartition(".")[0]                     # sifm_min, or the name under which it was vendored


def share_of_work(shard, environment):
    """(index, count) of this process among all that share the work: --shard, and within it the ranks of torchrun."""
    (index, count), (place, size) = shard, rank(environment)
    return index * size + place, count * size


def carry_out(runner, cases, remark=None, finished=None):
    """Run all cases. Cases that another process holds come last; wait for them."""
    waiting, remarked = list(cases), False
    while waiting:
        held = []
        for case in waiting:
            try:
                runner.run(case)
            except Busy:
                held.append(case)
            else:
                if finished:
                    finished(case)
        if len(held) == len(waiting):
            if remark and not remarked:
                remark(f"another process works on the {len(held)} pictures that are left; waiting for it")
                remarked = True
            time.sleep(0.5)
        waiting = held


def are_small(editors):
    """True if all editors that edit are miniatures on the CPU."""
    return all(editor.is_small and editor.device.type == "cpu" for editor in editing(editors).values())


def jobs(args, editors):
    """The number of processes: --jobs, else one per core if the editors are small and run on the CPU, else 1."""
    if args.helper_of:
        return 1                                             # a helper starts no helpers
    if args.jobs:
        return args.jobs
    if not are_small(editors) or args.shard != (0, 1) or "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rounds(suite, editors):
    """The rounds of a run: the names of the editors that each round uses together, None for any.

    Transfer with two large editors has several rounds, so that two editors never share the memory: each editor immunizes in
    one round, and the other edits the result in the next. Between them is a round for what is made for both; where they do not
    fit together, the memory plan takes turns. The last round is for steps that another process left.
    """
    if suite != "transfer" or are_small(editors):
        return [None]
    first, second = editing(editors)
    return [(first,), (second,), (first, second), (first,), (second,), None]


@contextlib.contextmanager
def helpers(count, argv):
    """Run `count` more processes of this command, one thread each, while the block runs; they take pictures like this one."""
    if not count:
        yield []
        return
    import torch
    torch.set_num_threads(1)
    command = [sys.executable, "-m", f"{PACKAGE}.evaluate", *argv, "--quiet", "--helper-of", str(os.getpid())]
    places = [str(Path(__file__).resolve().parents[PACKAGE.count(".") + 2]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    processes = [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                 for _ in range(count)]
    try:
        yield processes
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
