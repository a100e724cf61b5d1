"""Masks of scopes and structures by plain loops over weights, one at a time."""

import itertools
from fractions import Fraction

import numpy as np
import torch


def cube_index(shape, transposed):
    """Yield (output, input, tap) of each weight in flat order."""
    for place in itertools.product(*map(range, shape)):
        place = (*place, *[0] * (2 - len(place)))
        first, second, *tap = place
        swap = transposed and len(shape) > 1
        yield (second, first, tuple(tap)) if swap else (first, second, tuple(tap))


def units_of(structure, shape, transposed=False):
    """Return lists of flat indices of weights that belong together, in order."""
    units = {}
    for flat, (out, inputs, tap) in enumerate(cube_index(shape, transposed)):
        if structure == "weights":
            key = flat
        elif structure == "channels":
            key = out
        else:
            rows, columns = map(int, structure.removeprefix("blocks:").split("x"))
            key = out // rows, inputs // columns, tap
        units.setdefault(key, []).append(flat)
    return [units[key] for key in sorted(units)]


def groups_of(m, shape, transposed=False):
    """Return lists of flat indices of weights of one group of inputs, in order."""
    groups = {}
    for flat, (out, inputs, tap) in enumerate(cube_index(shape, transposed)):
        groups.setdefault((out, inputs // m, tap), []).append((inputs, flat))
    return [[flat for _, flat in sorted(group)] for group in groups.values()]


def n_of_m(scores, n, m, transposed=(), among=None):
    """Return masks of the n largest in each group of m."""
    masks = {}
    for name, s in scores.items():
        values, mask = s.flatten().tolist(), [False] * s.numel()
        inside = [True] * len(mask) if among is None else among[name].flatten().tolist()
        for group in groups_of(m, s.shape, name in transposed):
            free = [i for i in group if inside[i]]
            for i in sorted(free, key=lambda i: -values[i])[:n]:
                mask[i] = True
        masks[name] = torch.tensor(mask, dtype=torch.bool).view(s.shape)
    return masks


def keep_units(scores, structure, counts, least=0, transposed=(), among=None):
    """Return masks of units in the order of their mean scores, as many as fit.

    ``counts`` is one number for all layers, or one for each; each layer first keeps
    its best units until they hold ``least`` weights.
    """
    units = []
    for layer, (name, s) in enumerate(scores.items()):
        values = s.double().flatten().numpy()
        for flats in units_of(structure, s.shape, name in transposed):
            if among is not None:
                flats = [i for i in flats if among[name].flatten()[i]]
            if flats:
                mean = np.float32(np.mean(values[flats]))
                units.append((-mean, layer, name, flats))
    units.sort(key=lambda unit: unit[:2])  # stable: by order within a layer
    kept = []
    if isinstance(counts, int):
        kept = _first(units, scores, least)
        rest = [unit for unit in units if not any(unit is k for k in kept)]
        kept += _prefix(rest, counts - _size(kept)) or (not kept and units[:1] or [])
    else:
        for name, count in counts.items():
            kept += _prefix([unit for unit in units if unit[2] == name], count)
    masks = {n: torch.zeros(s.numel(), dtype=torch.bool) for n, s in scores.items()}
    for _, _, name, flats in kept:
        masks[name][flats] = True
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


def _size(units):
    return sum(len(flats) for *_, flats in units)


def _prefix(units, count):
    kept = []
    for unit in units:
        if _size(kept) + len(unit[3]) > count:
            break
        kept.append(unit)
    return kept


def _first(units, scores, least):
    kept = []
    for name in scores:
        mine = []
        for unit in (unit for unit in units if unit[2] == name):
            if _size(mine) >= least:
                break
            mine.append(unit)
        kept += mine
    return kept


def clamped_shares(weights, low, high, keep):
    """Return each weight times one factor, within its bounds, so that all sum to keep.

    The factor is between two of the numbers at which a share meets a bound.
    """

    def shares(factor):
        pairs = zip(weights, low, high, strict=True)
        return [min(max(w * factor, lo), hi) if w else lo for w, lo, hi in pairs]

    bounds = zip(weights, low, high, strict=True)
    meets = {Fraction(b) / w for w, lo, hi in bounds if w for b in (lo, hi)}
    steps = sorted(meets | {Fraction(0)})
    if not meets or sum(shares(steps[-1])) <= keep:
        return shares(steps[-1])
    for a, b in itertools.pairwise(steps):
        first, last = sum(shares(a)), sum(shares(b))
        if first <= keep <= last:
            part = Fraction(keep - first) / (last - first) if last > first else 0
            return shares(a + (b - a) * part)
    return shares(steps[0])
