"""The compiled loops over a block of rows: genes chosen, values kept, scaled or drawn.

A block is ``data``, ``ids`` and ``indptr`` of some rows, which are changed where they lie: what follows takes the place of what
is dropped.  Kernels run without Python's lock and take nothing on trust: where a value or an id is not what it must be, its
place is the answer (else -1).
"""

# mypy: disallow-untyped-decorators=False
# numba has integers of one kind where mypy sees several
# mypy: disable-error-code="assignment,no-any-return,operator,call-overload"

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from scdl_zarr.reading.feistel import mixed

__all__ = [
    "add_rows",
    "choose_genes",
    "copy_block",
    "divide_rows",
    "downsample",
    "keep_at_least",
    "keep_largest",
    "keep_some",
    "make_canonical",
    "mark_above",
    "take_log1p",
]

U = np.uint64
_GOLDEN, _S11 = U(0x9E3779B97F4A7C15), U(11)
UNIT = 2.0**-53
EXACT = 2.0**53
REMEMBERED = 1 << 8  # a power of two
SMALL = 1 << 8
LARGEST_TOTAL = 1 << 31  # counts of a row that are drawn from one by one
OUT_OF_REACH = -2  # the answer for a row of more


@intrinsic
def _zeros_below(_context: Any, word: Any) -> Any:
    """How many zero bits a word that is not zero ends with."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(word), generate


@nb.njit(nogil=True, inline="always")
def draw(key: Any, number: Any) -> Any:
    """The `number`-th random number in [0, 1) of a key (SplitMix64 of Steele, Lea and Flood 2014, by position)."""
    return np.float64(mixed(key + _GOLDEN * (U(number) + U(1))) >> _S11) * UNIT


@nb.njit(nogil=True, inline="always")
def longest_row(indptr: Any) -> int:
    longest = 0
    for row in range(len(indptr) - 1):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest


# ---- genes


@nb.njit(nogil=True, cache=True, error_model="numpy")
def choose_genes(
    data: Any, ids: Any, genes: Any, indptr: Any, bits: Any, place: Any, width: Any, rising: Any, checked: Any
) -> int:
    """Keep the values of genes that have a bit, renumbered by `place`; sorted by the new number, stably, unless `rising`.

    `genes` are the ids once more, taken as unsigned: a negative one is a very large one.
    """
    n = U(len(place))
    hits = np.empty(longest_row(indptr) + 1, np.uint32)  # from the beginning of the row
    values, numbers = np.empty(0 if rising else len(hits), data.dtype), np.empty(0 if rising else len(hits), ids.dtype)
    seen = np.zeros(0 if rising else (width + 63) // 64, np.uint64)
    where = np.empty(0 if rising else width, np.uint32)
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        mine = genes[start:stop]
        largest = genes.dtype.type(0)
        for k in range(0 if checked else len(mine)):
            largest = max(largest, mine[k])
        if stop > start and largest >= n:
            return start + np.argmax(mine)
        found, k, last = U(0), U(0), U(len(mine))
        while k + U(2) <= last:
            first, second = U(mine[k]), U(mine[k + U(1)])
            hits[found] = k
            found += (bits[first >> U(6)] >> (first & U(63))) & U(1)
            hits[found] = k + U(1)
            found += (bits[second >> U(6)] >> (second & U(63))) & U(1)
            k += U(2)
        if k < last:
            hits[found] = k
            found += (bits[U(mine[k]) >> U(6)] >> (U(mine[k]) & U(63))) & U(1)
        count = np.int64(found)
        indptr[row] = at
        given, kept, new_ids = data[start:stop], data[at : at + count], ids[at : at + count]
        if rising:
            for j in range(count):
                k = hits[j]
                kept[j], new_ids[j] = given[k], place[mine[k]]
        else:
            repeated = False
            for j in range(count):
                k = hits[j]
                new = U(place[mine[k]])
                values[j], numbers[j] = given[k], new
                bit, word = U(1) << (new & U(63)), new >> U(6)
                repeated |= (seen[word] & bit) != 0
                seen[word] |= bit
                where[new] = j
            if repeated:
                order = np.argsort(numbers[:count], kind="mergesort")
                for j in range(count):
                    kept[j], new_ids[j] = values[order[j]], numbers[order[j]]
                seen[:] = 0
            elif count:
                to = U(0)
                for word in range(len(seen)):
                    left = seen[word]
                    while left != 0:
                        new = U(word) << U(6) | _zeros_below(left)
                        kept[to], new_ids[to] = values[where[new]], new
                        left &= left - U(1)
                        to += U(1)
                    seen[word] = U(0)
        at += count
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def make_canonical(data: Any, ids: Any, indptr: Any) -> int:
    """Rows sorted by gene, a gene that is stored several times in a row summed."""
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        before, after, sound = ids[start : max(stop - 1, start)], ids[min(start + 1, stop) : stop], True
        for k in range(len(before)):
            sound &= before[k] < after[k]
        indptr[row] = at
        if sound:
            if at != start:
                for k in range(start, stop):
                    data[at + k - start], ids[at + k - start] = data[k], ids[k]
            at += stop - start
        else:
            order = np.argsort(ids[start:stop], kind="mergesort")
            values, numbers = data[start:stop].copy(), ids[start:stop].copy()
            last = np.int64(-1)
            for j in range(stop - start):
                if numbers[order[j]] == last:
                    data[at - 1] += values[order[j]]
                else:
                    last = np.int64(numbers[order[j]])
                    data[at], ids[at] = values[order[j]], numbers[order[j]]
                    at += 1
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


# ---- which values stay


@nb.njit(nogil=True, cache=True, error_model="numpy")
def keep_at_least(data: Any, ids: Any, indptr: Any, smallest: Any) -> int:
    """Keep the values that are not below `smallest`."""
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        indptr[row] = at
        for k in range(start, stop):
            value = data[k]
            data[at], ids[at] = value, ids[k]
            at += value >= smallest
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


@nb.njit(nogil=True)
def find_largest(values: Any, k: int) -> Any:
    """The k-th largest of some values, which are reordered: quickselect, with three parts because counts repeat.

    Where all are counts, and the one that is looked for is small, they are counted instead.
    """
    whole = True
    for j in range(len(values)):
        whole &= (values[j] >= 0) & (values[j] == np.floor(values[j]))
    if whole:
        counts = np.zeros((2, SMALL), np.int32)  # two, since one after the other the same counter would have to wait for itself
        for j in range(len(values)):
            counts[j & 1, np.uint32(np.int32(min(values[j], SMALL - 1)))] += 1
        left = k
        for value in range(SMALL - 1, -1, -1):
            left -= counts[0, value] + counts[1, value]
            if left <= 0 and value < SMALL - 1:
                return values.dtype.type(value)
            if left <= 0:
                break
    low, high, wanted = 0, len(values), k - 1
    while True:
        first, middle, last = values[low], values[(low + high) // 2], values[high - 1]
        pivot = max(min(first, middle), min(max(first, middle), last))
        above, below, j = low, high, low  # [low, above) > pivot, [above, j) == pivot, [below, high) < pivot
        while j < below:
            value = values[j]
            if value > pivot:
                values[j], values[above] = values[above], value
                above += 1
                j += 1
            elif value == pivot:
                j += 1
            else:
                below -= 1
                values[j], values[below] = values[below], value
        if wanted < above:
            high = above
        elif wanted < below:
            return pivot
        else:
            low = below


@nb.njit(nogil=True, cache=True, error_model="numpy")
def keep_largest(data: Any, ids: Any, indptr: Any, count: Any) -> int:
    """Keep the `count` largest values of each row, in their order; of equal ones the first.  A NaN's place is an error."""
    scratch = np.empty(longest_row(indptr), data.dtype)
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        n = stop - start
        indptr[row] = at
        if n > count:
            mine, sound, above = data[start:stop], True, 0
            for k in range(n):
                scratch[k] = mine[k]
                sound &= mine[k] == mine[k]
            if not sound:
                for k in range(start, stop):
                    if data[k] != data[k]:
                        return k
            smallest = find_largest(scratch[:n], count)
            for k in range(n):
                above += mine[k] > smallest
            equal = count - above
            kept, numbers, to = data[at:stop], ids[at:stop], U(0)
            own = ids[start:stop]
            for k in range(n):
                value = mine[k]
                same = value == smallest
                kept[to], numbers[to] = value, own[k]
                to += U((value > smallest) | (same & (equal > 0)))
                equal -= same
            at += np.int64(to)
        else:
            for k in range(start, stop):
                data[at], ids[at] = data[k], ids[k]
                at += 1
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def keep_some(data: Any, ids: Any, indptr: Any, count: Any, keys: Any) -> int:
    """Keep `count` of each row's values that are not zero, drawn without replacement, in their order (Knuth's algorithm S)."""
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        left, wanted = 0, count
        for k in range(start, stop):
            left += data[k] != 0
        indptr[row] = at
        for k in range(start, stop):
            value = data[k]
            if value != 0:
                data[at], ids[at] = value, ids[k]
                taken = draw(keys[row], k - start) * left < wanted
                at += taken
                wanted -= taken
                left -= 1
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


# ---- other values


@nb.njit(nogil=True, cache=True, error_model="numpy")
def add_rows(data: Any, indptr: Any, sums: Any) -> int:
    """The sum of each row, in the order of its values and in float64."""
    for row in range(len(indptr) - 1):
        values, whole = data[indptr[row] : indptr[row + 1]], True
        first = second = third = fourth = 0.0  # of integers, sums are the same in any order, and four at once take less time
        n = len(values) // 4
        for j in range(n):
            a, b, c, d = values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]
            first, second, third, fourth = first + a, second + b, third + c, fourth + d
            whole &= (a == np.floor(a)) & (b == np.floor(b)) & (c == np.floor(c)) & (d == np.floor(d))
        for k in range(4 * n, len(values)):
            first += values[k]
            whole &= values[k] == np.floor(values[k])
        total = first + second + third + fourth
        if not whole or not abs(total) < EXACT:
            total = 0.0
            for k in range(len(values)):
                total += values[k]
        sums[row] = total
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def divide_rows(data: Any, indptr: Any, divisors: Any) -> int:
    """Each row's values by its divisor, in the dtype of both."""
    for row in range(len(indptr) - 1):
        values, divisor = data[indptr[row] : indptr[row + 1]], divisors[row]
        for k in range(len(values)):
            values[k] /= divisor
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def take_log1p(data: Any, words: Any, indptr: Any) -> int:
    """The logarithm of one plus each value; `words` are the bits of the values.

    A row has few values that differ: a logarithm is looked up where the same one was taken before.
    """
    known, logarithms = np.zeros(REMEMBERED, words.dtype), np.zeros(REMEMBERED, data.dtype)  # log1p(0.0) is 0.0
    mine, bits = data[indptr[0] : indptr[len(indptr) - 1]], words[indptr[0] : indptr[len(indptr) - 1]]
    for k in range(len(mine)):
        word = bits[k]
        place = (U(word) * _GOLDEN) >> U(56)
        if known[place] == word:
            mine[k] = logarithms[place]
        else:
            mine[k] = np.log1p(mine[k])
            known[place], logarithms[place] = word, mine[k]
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def mark_above(data: Any, indptr: Any, threshold: Any) -> int:
    """1 for each value above a threshold, 0 for the others."""
    for k in range(indptr[0], indptr[len(indptr) - 1]):
        data[k] = data[k] > threshold
    return -1


@nb.njit(nogil=True, cache=True, error_model="numpy")
def downsample(data: Any, ids: Any, indptr: Any, count: Any, keys: Any) -> int:
    """Draw `count` of each row's counts without replacement, where it has more; zeros that are left are dropped."""
    at, start = 0, indptr[0]
    for row in range(len(indptr) - 1):
        stop = indptr[row + 1]
        indptr[row] = at
        total = 0.0
        for k in range(start, stop):
            value = data[k]
            if not (value >= 0 and value == np.floor(value)):
                return k
            total += value
        if total > count:
            if total > LARGEST_TOTAL:
                return OUT_OF_REACH
            left, wanted, number = np.int64(total), np.int64(count), 0
            for k in range(start, stop):
                value, taken = np.int64(data[k]), 0
                for _ in range(value):
                    hit = draw(keys[row], number) * left < wanted
                    taken += hit
                    wanted -= hit
                    left -= 1
                    number += 1
                data[at], ids[at] = taken, ids[k]
                at += taken > 0
        else:
            for k in range(start, stop):
                value = data[k]
                data[at], ids[at] = value, ids[k]
                at += value != 0
        start = stop
    indptr[len(indptr) - 1] = at
    return -1


# ---- out of the block


@nb.njit(nogil=True, cache=True, error_model="numpy")
def copy_block(data: Any, ids: Any, indptr: Any, places: Any, starts: Any, values_out: Any, ids_out: Any) -> int:
    """Each row to where it starts in the batch."""
    for row in range(len(indptr) - 1):
        start, stop, at = indptr[row], indptr[row + 1], starts[places[row]]
        values_out[at : at + stop - start] = data[start:stop]
        ids_out[at : at + stop - start] = ids[start:stop]
    return -1
