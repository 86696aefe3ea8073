"""Decoding as one launch: the step that reads a token is recorded as a CUDA graph and replayed."""

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from support.forward import next_logits, shortcuts
from support.run_folder import one_line

# where a step is recorded
DEVICES = ["cuda"]


def capture(work):
    """Record `work` -> a function that does it again in the same memory."""
    graph = torch.cuda.CUDAGraph()
    # a recording that fails would leave us on its stream
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        work()
    return graph.replay


class FixedLayer(DynamicLayer):
    """A layer's keys and values, (n, heads, columns, d), in memory that does not grow."""

    def __init__(self, layer, row, columns, column, dtype):
        super().__init__()
        self.column, self.is_initialized = column, True
        more = (0, 0, 0, columns - layer.keys.shape[2])
        self.keys, self.values = (pad(t[row].to(dtype), more) for t in (layer.keys, layer.values))

    def update(self, keys, values, *_, **__):
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.index_copy_(2, self.column, new.to(kept))
        return self.keys, self.values


def replayable(model, cache):
    """Whether a step can be recorded: not of recurrent layers, sliding windows or shared keys."""
    whole = shortcuts(model, cache) and all(layer.keys is not None for layer in cache.layers)
    return whole and model.device.type in DEVICES


class Replay:
    """What was read, with a row for each response (n), and room for `more` columns.

    What a step reads and writes stays in its place, so that its launches can be recorded. A
    recording serves one call of `generate`: none outlives an update of the weights.
    """

    def __init__(self, model, read, row, more):
        self.model, (self.cache, mask, position) = model, read
        row, layers = row.to(model.device), self.cache.layers
        # a multiple of 16, which attention's kernels are made for
        columns = -(-(mask.shape[1] + more) // 16) * 16
        self.column = torch.tensor([mask.shape[1] - 1], device=model.device)
        self.position = position[row]
        self.token = torch.zeros_like(self.position)
        # under autocast, keys may be float32 where values are bfloat16
        dtype = layers[0].values.dtype
        for i in range(len(layers)):
            # the old one is freed before the next is made
            layers[i] = FixedLayer(layers[i], row, columns, self.column, dtype)
        mask = pad(mask[row], (0, columns - mask.shape[1])).to(dtype)
        self.mask = mask.log()[:, None, None]
        self.recorded, self.steps = None, 0

    def read(self, row, token):
        """The rows `row` read a token (n,) each, the others anything -> logits (N, V) of all."""
        token = token.to(self.model.device)
        self.token[row] = token[:, None]
        self.steps += 1
        # not the first, which loads kernels
        if self.steps == 2:
            self.record()
        (self.recorded or self.step)()
        return self.logits

    def step(self):
        self.column += 1
        self.position += 1
        self.mask.index_fill_(3, self.column, 0)
        self.logits = next_logits(self.model, self.token, self.mask, self.position, self.cache)

    def record(self):
        try:
            self.recorded = capture(self.step)
        except Exception as error:
            # of many kinds, with their cause; this cache goes on launch by launch, the next grows
            DEVICES.clear()
            print("no CUDA graph of decoding:", one_line(error.__context__ or error))
