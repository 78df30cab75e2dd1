"""Networks that are read in parts: each part when it first runs, and blocks, if wanted, again each time that they run.

A network whose class has `STREAMED`, the paths of its lists of blocks, holds one block at a time while its attribute
`streaming` is True. With `checkpointing` a block that runs again in the backward pass is read again as well.
"""

from . import readahead


def ahead_of(network, found):
    """The tensors to prefetch, in reading order. Embeddings are left out: few of their rows are ever read.

    found: {file: {name in the network: (name in the file, its place)}}.
    """
    import torch  # here, so that `weights list` starts without it

    embeddings = {f"{path}.weight" for path, part in network.named_modules() if isinstance(part, torch.nn.Embedding)}
    places = {name: (file, *spans[stored]) for file, tensors in found.items() if (spans := readahead.spans(file))
              for name, (stored, _) in tensors.items()}
    return readahead.ReadAhead((name, *places[name]) for name in network.state_dict()
                               if name in places and name not in embeddings)


def load_in_parts(network, read, ahead):
    """Load the weights of each part, blocks and single layers alike, when it first runs.

    network: on the meta device. read: names -> {name: tensor}. ahead: a `ReadAhead` of the tensors.
    """
    unread, handles = {name: tensor.dtype for name, tensor in network.state_dict().items()}, {}

    def fill(part, path):
        wanted = [name for name in unread if name.startswith(f"{path}.")]
        _assign(part, path, wanted, read)
        ahead.reached(wanted)
        for name in wanted:
            del unread[name]
        for name, _ in part.named_modules(prefix=path):         # inner parts were loaded with it
            if name in handles:
                handles.pop(name).remove()

    for path, part in network.named_modules():
        if path:                                                # the network as a whole runs its parts one by one
            handles[path] = part.register_forward_pre_hook(lambda part, inputs, path=path: fill(part, path))
    own = [name for name in unread if "." not in name]
    for name in own:
        del unread[name]
    network.load_state_dict(read(own), strict=False, assign=True)
    _stream(network, read)
    ahead.begin()


def _assign(part, path, wanted, read):
    """Load the tensors called `wanted` into the part, in the dtype that it has now: it may differ from the file's."""
    state, found = part.state_dict(prefix=f"{path}."), read(wanted)
    part.load_state_dict({name.removeprefix(f"{path}."): tensor.to(state[name].dtype) for name, tensor in found.items()},
                         strict=False, assign=True)


def _stream(network, read):
    """Have blocks let go, while `network.streaming`, when another one runs, and read again before they run."""
    blocks = {f"{path}.{i}": block for path in getattr(network, "STREAMED", ())
              for i, block in enumerate(network.get_submodule(path))}
    ran = []                                                    # the block that ran last

    def enter(part, path, block):
        if network.streaming and ran != [block]:
            for other in blocks.values():
                if other is not block and not all(weight.is_meta for weight in other.parameters()):
                    other.to_empty(device="meta")               # a graph that needs its weights keeps the old tensors
            ran[:] = [block]
        if any(weight.is_meta for weight in part.parameters()):
            absent = [name for name, tensor in part.state_dict(prefix=f"{path}.").items() if tensor.is_meta]
            _assign(part, path, absent, read)

    for name, block in blocks.items():
        for path, part in block.named_modules(prefix=name):
            part.register_forward_pre_hook(lambda part, _, path=path, block=block: enter(part, path, block))
