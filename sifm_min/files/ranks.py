"""The processes of one torchrun: the share of each, and the end that they wait for together."""

import datetime
import time


def rank(environment):
    """(index, count) of this process among those that torchrun started, as it says in their environment; else (0, 1)."""
    if "WORLD_SIZE" not in environment:
        return 0, 1
    index, count = environment.get("RANK", ""), environment["WORLD_SIZE"]
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"RANK {index!r} of WORLD_SIZE {count!r} is no share of the work: leave both to torchrun, or "
                         "unset them")
    return int(index), int(count)


def meet(environment, *, wait):
    """Tell the other processes of this torchrun that this one has done its share. wait: until all have done theirs.

    torchrun stops all processes as soon as one ends with an error, and would do so again at every new start: one with an error
    has to wait.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or (count := rank(environment)[1]) == 1:
        return
    from torch.distributed import TCPStore
    try:
        store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False,
                         timeout=datetime.timedelta(seconds=30))
        done = f"sifm_min {environment['TORCHELASTIC_RUN_ID']} {environment.get('TORCHELASTIC_RESTART_COUNT')}"
        arrived = store.add(done, 1)
        while wait and arrived < count:
            time.sleep(1)
            arrived = store.add(done, 0)
    except (KeyError, ValueError, RuntimeError):             # a launcher without this store, or one that has ended
        return
