"""The state of a training: a network, the average of its weights, the optimiser, and a file from which it goes on."""

import time

import torch
from torch import nn

WARM_UP, PLATEAU, DECAY = 50, 0.4, 0.999                     # steps; share before the rate falls; of the average of weights
SAVE_EVERY = 180                                             # seconds


def say(text):
    """Print a line of a log, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def save(value, path):
    """Write a file of torch, whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


class Run:
    """A training with AdamW whose rate rises for `WARM_UP` steps, stays, and falls to zero in a straight line.

    The end is at `steps`, or after so many `minutes`, whichever comes first; both count over all resumptions, and either may
    be None. The checkpoint is `path`. Only weights that require a gradient are trained and averaged.
    """

    def __init__(self, path, network, *, rate, steps=None, minutes=None):
        self.path, self.network, self.rate, self.steps, self.minutes = path, network, rate, steps, minutes
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimiser = torch.optim.AdamW(self.trained.values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.step, self.before, self.loss = 0, 0.0, None
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=next(network.parameters()).device)
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step, self.before = state["average"], state["step"], state["seconds"]
            say(f"{path.stem} goes on at step {self.step}")
        self.started = self.saved = time.monotonic()

    @property
    def seconds(self):
        """The time of the training so far."""
        return self.before + time.monotonic() - self.started

    @property
    def share(self):
        """The part of the training that is done, from 0 to 1."""
        by_steps = self.step / self.steps if self.steps else 0
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0
        return min(max(by_steps, by_time), 1)

    @property
    def done(self):
        return self.share >= 1

    def descend(self, loss):
        """One step down the gradient of a loss, which is a scalar with its graph."""
        rate = self.rate * min(1, (self.step + 1) / WARM_UP, (1 - self.share) / (1 - PLATEAU))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - keep)
        value = loss.item()
        self.loss = value if self.loss is None else 0.98 * self.loss + 0.02 * value
        if self.step % 50 == 0:
            say(f"{self.path.stem} {self.step}  {100 * self.share:.1f} %  loss {self.loss:.4f}  rate {rate:.1e}  "
                f"{self.seconds / self.step:.3f} s a step")
        if self.done or time.monotonic() > self.saved + SAVE_EVERY:
            self.save()

    def save(self):
        state = {"network": self.network.state_dict(), "average": self.average, "optimiser": self.optimiser.state_dict(),
                 "step": self.step, "seconds": self.seconds}
        save(state, self.path)
        self.saved = time.monotonic()

    def finished(self):
        """The network with the averaged weights, frozen."""
        return with_average(self.network, self.average)


def with_average(network, average):
    network.load_state_dict(network.state_dict() | average)
    return network.eval().requires_grad_(False)


def trained(path, network):
    """The network with the averaged weights of a checkpoint, frozen."""
    return with_average(network, torch.load(path, weights_only=True, map_location="cpu")["average"])
