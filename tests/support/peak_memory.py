"""The peak memory of loading a network, measured in a process of its own: code for `forked("-c", ...)`."""

SCRIPT = """
import sys, threading, torch
from pathlib import Path
from sifm_min.models.checkpoints import open_checkpoint
{network}
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

checkpoint = open_checkpoint(sys.argv[1], ["{component}"])
torch.zeros(9).half().float()                                   # torch sets up some things once
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
network = checkpoint.load(Network, "{component}", dtype=torch.float32)
done.set()
watcher.join()
print((peak - before) / sum(tensor.numel() * 4 for tensor in network.state_dict().values()))
"""


def script(network, component):
    """Code that loads sys.argv[1] in float32 and prints the peak over the network's size. network: code of a class Network."""
    return SCRIPT.format(network=network, component=component)
