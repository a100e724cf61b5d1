"""The explicit graph of a network: which weights lie on a path, found by search."""

from __future__ import annotations

import itertools
from collections import defaultdict


class Graph:
    """Values as nodes, what they are made of as edges; grids are ``[C][H][W]``."""

    def __init__(self):
        self.edges = []  # from, to, and the weight between: a name and a place
        self.count = itertools.count()

    def grid(self, *shape):
        """Return new nodes; the places of a grid by index."""
        places = itertools.product(*map(range, shape))
        return {place: next(self.count) for place in places}

    def linear(self, source, name, mask):
        """Add a Linear module after values ``[features]``."""
        out = self.grid(mask.shape[0])
        for o, i in mask.nonzero().tolist():
            self.edges.append((source[i,], out[o,], (name, (o, i))))
        return out

    def conv(self, source, name, mask, stride=1, padding=0, groups=1):
        """Add a convolution of two dimensions after ``[C][H][W]``."""
        _, height, width = map(max, zip(*source, strict=True))
        outputs, own, *kernel = mask.shape
        sizes = [
            (n + 1 + 2 * padding - k) // stride + 1
            for n, k in zip((height, width), kernel, strict=True)
        ]
        out = self.grid(outputs, *sizes)
        for o, i, ky, kx in mask.nonzero().tolist():
            channel = o // (outputs // groups) * own + i
            for y, x in itertools.product(*map(range, sizes)):
                at = channel, y * stride - padding + ky, x * stride - padding + kx
                if at in source:
                    edge = source[at], out[o, y, x], (name, (o, i, ky, kx))
                    self.edges.append(edge)
        return out

    def join(self, out, *sources):
        """Let a grid depend on others at the same place."""
        for source, place in itertools.product(sources, out):
            self.edges.append((source[place], out[place], None))
        return out

    def pool(self, source, size):
        """Add pooling by squares that don't overlap."""
        channels, height, width = (n + 1 for n in map(max, zip(*source, strict=True)))
        out = self.grid(channels, height // size, width // size)
        for (c, y, x), node in source.items():
            if (place := (c, y // size, x // size)) in out:
                self.edges.append((node, out[place], None))
        return out

    def flat(self, source):
        """Return the nodes in one dimension."""
        return {(i,): node for i, node in enumerate(source.values())}

    def on_paths(self, inputs, outputs):
        """Return the weights on a path from an input to an output."""
        after, before = defaultdict(list), defaultdict(list)
        for a, b, _ in self.edges:
            after[a].append(b)
            before[b].append(a)
        begun = _reached(inputs.values(), after)
        ending = _reached(outputs.values(), before)
        return {w for a, b, w in self.edges if w and a in begun and b in ending}


def _reached(begin, edges):
    todo = list(begin)
    seen = set(todo)
    while todo:
        new = set(edges[todo.pop()]) - seen
        seen |= new
        todo += new
    return seen
