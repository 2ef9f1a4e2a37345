"""The compiled loops that make tokens of a block of rows: genes in their order, by rank of their value, or with binned values.

Each row goes to a line of ``out_ids`` (and ``out_values``), filled up with padding; ``lengths`` says how many tokens it has.
``tokens`` holds the token of each gene, -1 for those without one.
"""

# mypy: disallow-untyped-decorators=False
# numba has integers of one kind where mypy sees several
# mypy: disable-error-code="assignment,no-any-return,operator,call-overload"

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from scdl_zarr.loading.pass_kernels import draw, find_largest, longest_row

__all__ = ["bin_values", "list_genes", "rank_genes"]

U = np.uint64
LEVELS, DIGIT = 1 << 16, 256  # sort keys are cut to 16 bits, and dealt out by one byte after the other
SMALL = 1 << 12  # counts below are counted
MOST_MOVES = 16  # a value, before another way is taken
KEEP_FIRST, KEEP_SAMPLE, KEEP_LARGEST = range(3)
BOTH, ONE = range(2)
SIGN, ALL = np.uint32(1 << 31), np.uint32(0xFFFFFFFF)


@nb.njit(nogil=True)
def _sort(values: Any, floats: Any, words: Any, order: Any, other: Any, counts: Any) -> None:
    """`order` becomes the places of `values` (float64) from the smallest to the largest, equal ones in their order.

    Values are rounded to float32 (``floats``, of which ``words`` are the bits), which keeps their order, cut to their 16 leading
    bits of those that differ, dealt out by the lower and then by the higher byte of these, and what is left to do is done by
    insertion.
    """
    n = len(values)
    for k in range(n):
        floats[k] = values[k]
    low, high = ALL, np.uint32(0)
    for k in range(n):
        word = words[k]
        word ^= ALL if word & SIGN else SIGN  # unsigned numbers in the order of the floats
        words[k] = word
        low, high = min(low, word), max(high, word)
    shift = np.uint32(0)
    while n and (high - low) >> shift >= LEVELS:
        shift += np.uint32(1)
    counts[:] = 0
    for k in range(n):
        level = (words[k] - low) >> shift
        counts[0, level & np.uint32(255)] += 1
        counts[1, level >> np.uint32(8)] += 1
    first = second = np.int32(0)
    for digit in range(DIGIT):
        first, counts[0, digit] = first + counts[0, digit], first
        second, counts[1, digit] = second + counts[1, digit], second
    for k in range(n):
        digit = ((words[k] - low) >> shift) & np.uint32(255)
        other[counts[0, digit]] = k
        counts[0, digit] += 1
    for j in range(n):
        k = other[j]
        digit = ((words[k] - low) >> shift) >> np.uint32(8)
        order[counts[1, digit]] = k
        counts[1, digit] += 1
    moves = 0
    for i in range(1, n):
        k = order[i]
        word, j = words[k], i
        while j > 0:
            before = words[order[j - 1]]
            if before < word or (before == word and values[order[j - 1]] <= values[k]):
                break
            order[j] = order[j - 1]
            j -= 1
            moves += 1
        order[j] = k
        if moves > MOST_MOVES * n:
            order[:n] = np.argsort(values, kind="mergesort")
            return


@nb.njit(nogil=True)
def _pad(ids: Any, mask: Any, n: Any, pad: Any) -> None:
    mask[:n] = True
    mask[n:] = False
    ids[n:] = pad


@nb.njit(nogil=True, cache=True, error_model="numpy")
def rank_genes(
    data: Any,
    genes: Any,
    indptr: Any,
    places: Any,
    tokens: Any,
    factors: Any,
    totals: Any,
    target: Any,
    first: Any,
    last: Any,
    pad: Any,
    out_ids: Any,
    out_mask: Any,
    lengths: Any,
) -> int:
    """Tokens of the genes that are not zero, from the largest of ``value / total * target / median`` to the smallest.

    `factors` are one over the medians.  `first` and `last` come before and after them (-1: nothing does).  -1, or the place of a
    NaN, which has no rank.
    """
    room = longest_row(indptr) + 1
    values, mine = np.empty(room, np.float64), np.empty(room, np.int32)
    floats, order, other = np.empty(room, np.float32), np.empty(room, np.uint32), np.empty(room, np.uint32)
    words, counts = floats.view(np.uint32), np.empty((2, DIGIT), np.int32)
    width = out_ids.shape[1] - (first >= 0) - (last >= 0)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        given, own = data[start:stop], genes[start:stop]
        share, n, sound = 1.0 / totals[row], U(0), True
        for k in range(len(given)):
            gene, value = own[k], given[k]
            token = tokens[gene]
            sound &= value == value
            values[n], mine[n] = -(value * share * target * factors[gene]), token
            n += U((token >= 0) & (value != 0))
        if not sound:
            for k in range(start, stop):
                if data[k] != data[k]:
                    return k
        _sort(values[:n], floats, words, order, other, counts)
        line, at, kept = out_ids[places[row]], U(0), min(np.int64(n), width)
        if first >= 0:
            line[0] = first
            at = U(1)
        for j in range(kept):
            line[at + U(j)] = mine[order[j]]
        at += U(kept)
        if last >= 0:
            line[at] = last
            at += U(1)
        lengths[places[row]] = at
        _pad(line, out_mask[places[row]], at, pad)
    return -1


@nb.njit(nogil=True)
def _list(mine: Any, values: Any, first: Any, keep: Any, key: Any, ids: Any, outs: Any, scratch: Any) -> Any:
    """Tokens and values to a line, as many as it has room for: the first, a sample, or those with the largest values."""
    n, width, at = len(mine), len(ids), U(0)
    if first >= 0:
        ids[0], outs[0] = first, 0
        at, width = U(1), width - 1
    if n <= width or keep == KEEP_FIRST:
        kept = min(n, width)
        for j in range(kept):
            ids[at + U(j)] = mine[j]
        for j in range(kept):
            outs[at + U(j)] = values[j]
        return at + U(kept)
    if keep == KEEP_SAMPLE:
        left, wanted = n, width
        for j in range(n):
            if draw(key, j) * left < wanted:
                ids[at], outs[at] = mine[j], values[j]
                at += U(1)
                wanted -= 1
            left -= 1
        return at
    if width <= 0:
        return at
    scratch[:n] = values
    smallest, above = find_largest(scratch[:n], width), 0
    for j in range(n):
        above += values[j] > smallest
    equal, j = width - above, 0
    while at < U(len(ids)):  # as long as there is room, what is written too much is overwritten
        value = values[U(j)]
        same = value == smallest
        ids[at], outs[at] = mine[U(j)], value
        at += U((value > smallest) | (same & (equal > 0)))
        equal -= same
        j += 1
    return at


@nb.njit(nogil=True, cache=True, error_model="numpy")
def list_genes(
    data: Any,
    genes: Any,
    indptr: Any,
    places: Any,
    tokens: Any,
    keys: Any,
    keep: Any,
    first: Any,
    pad: Any,
    pad_value: Any,
    out_ids: Any,
    out_values: Any,
    out_mask: Any,
    lengths: Any,
) -> int:
    """Tokens and values of the genes that are not zero, in the order of the genes.

    -1, or the place of a NaN that has no rank.
    """
    room = longest_row(indptr) + 1
    values, scratch = np.empty(room, out_values.dtype), np.empty(room, out_values.dtype)
    mine = np.empty(room, out_ids.dtype)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        given, own, n, sound = data[start:stop], genes[start:stop], U(0), True
        ids, outs = out_ids[places[row]], out_values[places[row]]
        begin = np.int64(first >= 0)
        if stop - start < len(ids) - begin:  # all have room, and one that is not kept
            if first >= 0:
                ids[0], outs[0] = first, 0
            to_ids, to_values = ids[begin:], outs[begin:]
        else:
            to_ids, to_values = mine, values
        for k in range(len(given)):
            token, value = tokens[own[k]], given[k]
            sound &= value == value
            to_values[n], to_ids[n] = value, token
            n += U((token >= 0) & (value != 0))
        if keep == KEEP_LARGEST and not sound:
            for k in range(start, stop):
                if data[k] != data[k]:
                    return k
        at = n + U(begin)
        if stop - start >= len(ids) - begin:
            at = _list(mine[:n], values[:n], first, keep, keys[row], ids, outs, scratch)
        lengths[places[row]] = at
        _pad(ids, out_mask[places[row]], at, pad)
        outs[at:] = pad_value
    return -1


@nb.njit(nogil=True)
def _edge(low: Any, high: Any, share: Any) -> Any:
    """Between two values, as NumPy's "linear" quantiles: with the difference in the dtype of the values."""
    difference = np.float64(high - low)
    return high - difference * (1 - share) if share >= 0.5 else low + difference * share


@nb.njit(nogil=True)
def _bin_of(lower: Any, upper: Any, side: Any, key: Any, number: Any) -> Any:
    """The bin of a value that has so many edges below it, and up to it."""
    if side == BOTH and upper - lower > 1:
        return np.ceil(draw(key, number) * (lower - upper) + upper)
    return np.float64(upper)


@nb.njit(nogil=True)
def _bin_sorted(given: Any, values: Any, order: Any, quantiles: Any, edges: Any, side: Any, key: Any, digits: Any) -> None:
    """The bins of values whose order is known."""
    n, last = len(values), len(quantiles)
    for e in range(last if n else 0):
        at = quantiles[e] * (n - 1)
        below = min(np.int64(np.floor(at)), n - 1)
        edges[e] = _edge(given[order[below]], given[order[min(below + 1, n - 1)]], at - below)
    lower, upper, before = 0, 0, -1.0
    for j in range(n):
        k = order[j]
        value = values[k]
        if value != before:
            while lower < last and edges[lower] < value:
                lower += 1
            upper = max(upper, lower)
            while upper < last and edges[upper] <= value:
                upper += 1
            before = value
        digits[k] = _bin_of(lower, upper, side, key, k)


@nb.njit(nogil=True)
def _bin_counts(numbers: Any, quantiles: Any, edges: Any, largest: Any, side: Any, key: Any, digits: Any) -> None:
    """The same for counts up to `largest`, which are counted instead of sorted."""
    n, last = len(numbers), len(quantiles)
    several = np.zeros((2, largest + 1), np.int32)  # one after the other the same counter would have to wait for itself
    for k in range(n):
        several[k & 1, numbers[k]] += 1
    upto, total = several[0], 0
    for value in range(largest + 1):
        total += several[0, value] + several[1, value]
        upto[value] = total
    low = high = 0
    for e in range(last if n else 0):
        at = quantiles[e] * (n - 1)
        below = min(np.int64(np.floor(at)), n - 1)
        while upto[low] <= below:
            low += 1
        high = max(low, high)
        while upto[high] <= min(below + 1, n - 1):
            high += 1
        edges[e] = _edge(np.float64(low), np.float64(high), at - below)
    lowers, uppers = np.empty(largest + 1, np.int64), np.empty(largest + 1, np.int64)
    lower = upper = 0
    for value in range(largest + 1):
        while lower < last and edges[lower] < value:
            lower += 1
        upper = max(upper, lower)
        while upper < last and edges[upper] <= value:
            upper += 1
        lowers[value], uppers[value] = lower, upper
    for k in range(n):
        value = numbers[k]
        digits[k] = _bin_of(lowers[value], uppers[value], side, key, k)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def bin_values(
    data: Any,
    genes: Any,
    indptr: Any,
    places: Any,
    tokens: Any,
    keys: Any,
    quantiles: Any,
    side: Any,
    first: Any,
    pad: Any,
    pad_value: Any,
    out_ids: Any,
    out_values: Any,
    out_mask: Any,
    lengths: Any,
) -> int:
    """As `list_genes`, with the number of the bin between a row's own quantiles in place of each value.

    A value that is an edge of several bins is dealt out to them at random.  -1, or the place of a value that has no bin.
    """
    room = longest_row(indptr) + 1
    given, values, digits = np.empty(room, data.dtype), np.empty(room, np.float64), np.empty(room, out_values.dtype)
    mine, scratch = np.empty(room, out_ids.dtype), np.empty(room, out_values.dtype)
    floats, order, other = np.empty(room, np.float32), np.empty(room, np.uint32), np.empty(room, np.uint32)
    words, counts = floats.view(np.uint32), np.empty((2, DIGIT), np.int32)
    edges = np.empty(len(quantiles), np.float64)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        found, own, n, sound, small, largest = data[start:stop], genes[start:stop], U(0), True, True, np.int32(0)
        for k in range(len(found)):
            token, value = tokens[own[k]], found[k]
            number = np.int32(min(value, SMALL))  # a larger one is no int32, and is not counted
            sound &= value >= 0
            kept = (token >= 0) & (value != 0)
            small &= (number == value) | (not kept)
            largest = max(largest, number)
            given[n], order[n], mine[n] = value, number, token
            n += U(kept)
        if not sound:
            for k in range(start, stop):
                if not data[k] >= 0:
                    return k
        if small and 0 <= largest < SMALL:
            _bin_counts(order[:n], quantiles, edges, np.int64(largest), side, keys[row], digits)
        else:
            values[:n] = given[:n]
            _sort(values[:n], floats, words, order, other, counts)
            _bin_sorted(given[:n], values[:n], order[:n], quantiles, edges, side, keys[row], digits)
        ids, outs = out_ids[places[row]], out_values[places[row]]
        key = keys[row] ^ U(0xD1B54A32D192ED03)
        filled = _list(mine[:n], digits[:n], first, KEEP_SAMPLE, key, ids, outs, scratch)
        lengths[places[row]] = filled
        _pad(ids, out_mask[places[row]], filled, pad)
        outs[filled:] = pad_value
    return -1
