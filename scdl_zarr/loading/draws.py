"""The compiled loops of sampled orders: permutations of many small domains at once, draws by weight, classes spread evenly.

Everything random in them is a hash of a key (of seed, epoch and what it is for) and one or two numbers: any of it can be had
without what comes before it.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np

from scdl_zarr.reading.feistel import mixed

__all__ = ["bound_segments", "deal_block", "draw_weighted", "pack_clocks", "permute_each", "spread_classes", "words_of"]

LANES = 64
STEPS, SMALL_STEPS, SMALL_BITS = 16, 48, 16  # as of the keyed permutation of one domain
GAMMA = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64
_ONE, _S11, _S12, _S32 = np.uint64(1), np.uint64(11), np.uint64(12), np.uint64(32)
_TOP = np.uint64(1 << 63)


@nb.njit(nogil=True, inline="always")
def _word(key: Any, first: Any, second: Any) -> Any:
    """64 random bits of these numbers."""
    return mixed(mixed(key + GAMMA * np.uint64(first + 1)) + GAMMA * np.uint64(second + 1))


@nb.njit(nogil=True, inline="always")
def _uniform(key: Any, first: Any, second: Any) -> Any:
    """A number in [0, 1)."""
    return np.float64(_word(key, first, second) >> _S11) * (1.0 / (1 << 53))


@nb.njit(nogil=True, cache=True)
def permute_each(numbers: Any, sizes: Any, firsts: Any, seconds: Any, key: Any, out: Any) -> int:
    """Where each number goes in a permutation of 0 .. size-1 of its own, one for each key and pair (first, second).

    The network is that of ``reading/feistel.py``, its keys made on the way.  The place of the first number that is outside of its
    domain is returned, or -1.
    """
    low, high = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    shift, limit, own = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    low_mask, high_mask = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    places = np.empty(LANES, np.int64)
    for kind in range(2):  # large domains, then those of few bits, which take more steps
        steps = STEPS if kind == 0 else SMALL_STEPS
        following, lanes = 0, 0
        while True:
            while lanes < LANES and following < len(numbers):
                place, number, size = following, numbers[following], sizes[following]
                following += 1
                if number < 0 or number >= size:
                    return place
                bits = 2
                while (1 << bits) < size:
                    bits += 1
                if (bits <= SMALL_BITS) != (kind == 1):
                    continue
                if size == 1:
                    out[place] = 0
                    continue
                half = np.uint64(bits // 2)
                shift[lanes], limit[lanes], places[lanes] = half, np.uint64(size), place
                low_mask[lanes] = (_ONE << half) - _ONE
                high_mask[lanes] = (_ONE << (np.uint64(bits) - half)) - _ONE
                low[lanes], high[lanes] = np.uint64(number) & low_mask[lanes], np.uint64(number) >> half
                own[lanes] = _word(key, firsts[place], seconds[place])
                lanes += 1
            if lanes == 0:
                break
            for r in range(0, steps, 2):
                first, second = GAMMA * np.uint64(r + 1), GAMMA * np.uint64(r + 2)
                for k in range(lanes):
                    low[k] ^= mixed(high[k] ^ (own[k] + first)) & low_mask[k]
                    high[k] ^= mixed(low[k] ^ (own[k] + second)) & high_mask[k]
            left = 0
            for k in range(lanes):
                word = (high[k] << shift[k]) | low[k]
                if word < limit[k]:
                    out[places[k]] = np.int64(word)
                    continue
                low[left], high[left], own[left], places[left] = low[k], high[k], own[k], places[k]
                shift[left], limit[left], low_mask[left], high_mask[left] = shift[k], limit[k], low_mask[k], high_mask[k]
                left += 1
            lanes = left
    return -1


@nb.njit(nogil=True, cache=True)
def words_of(numbers: Any, key: Any, out: Any) -> None:
    """64 random bits for each number."""
    for k in range(len(numbers)):
        out[k] = _word(key, numbers[k], 0)


@nb.njit(nogil=True, cache=True)
def draw_weighted(cumulative: Any, positions: Any, key: Any, out: Any) -> None:
    """For each position the first place whose cumulative weight is above a random share of the total."""
    total = cumulative[-1]
    for k in range(len(positions)):
        share = _uniform(key, positions[k], 0) * total
        low, high = 0, len(cumulative) - 1
        while low < high:
            middle = (low + high) // 2
            if cumulative[middle] > share:
                high = middle
            else:
                low = middle + 1
        out[k] = low


@nb.njit(nogil=True, cache=True)
def pack_clocks(logs: Any, key: Any, bits: int, out: Any) -> None:
    """Words that sort by when a clock of the rate exp(log) rings first; their lowest bits are the number of the clock."""
    value = np.empty(1, np.float64)
    as_word, cut = value.view(np.uint64), np.uint64(bits)
    for k in range(len(logs)):
        share = (np.float64(_word(key, k, 0) >> _S12) + 0.5) * (1.0 / (1 << 52))  # never 0 or 1
        value[0] = math.log(-math.log(share)) - logs[k]
        word = as_word[0]
        word = ~word if word & _TOP else word | _TOP  # as integers they sort as the floats do
        out[k] = ((word >> cut) << cut) | np.uint64(k)


@nb.njit(nogil=True, cache=True)
def deal_block(shares: Any, key: Any, block: int, owners: Any, numbers: Any) -> None:
    """Owners in random places, each as often as its share says; and how many of the same owner come before each."""
    at = 0
    for owner in range(len(shares)):
        for _ in range(shares[owner]):
            owners[at] = owner
            at += 1
    for k in range(len(owners) - 1, 0, -1):
        other = np.int64(((_word(key, block, k) >> _S32) * np.uint64(k + 1)) >> _S32)
        kept = owners[k]
        owners[k] = owners[other]
        owners[other] = kept
    before = np.zeros(len(shares), np.int64)
    for k in range(len(owners)):
        numbers[k] = before[owners[k]]
        before[owners[k]] += 1


@nb.njit(nogil=True, inline="always")
def _come(size: Any, segment: Any, segments: Any, offset: Any) -> Any:
    """How many rows of a class come before a segment begins: at even distances, the first one at a random place."""
    return min(max(np.int64(math.ceil(size * (segment / segments) - offset)), 0), size)


@nb.njit(nogil=True, cache=True)
def bound_segments(sizes: Any, key: Any, segments: int, first: int, bounds: Any, come: Any) -> None:
    """Where segments begin, from the `first` on, as many as `bounds` holds; and how many of each class come before the last."""
    for k in range(len(bounds)):
        bounds[k] = 0
    for c in range(len(sizes)):
        offset = _uniform(key, c, 0)
        for k in range(len(bounds)):
            come[c] = _come(sizes[c], first + k, segments, offset)
            bounds[k] += come[c]


@nb.njit(nogil=True, cache=True)
def spread_classes(begin: Any, end: Any, key: Any, classes: Any, numbers: Any) -> None:
    """Fill a segment with the rows number [begin, end) of each class, so that any stretch of it has its share of each.

    A row may come when its class would be behind without it, and has to before the class is a whole row behind; of those that
    may, the one comes that has to soonest.  That way every class is less than a row from its share at every place (Tijdeman,
    "The chairman assignment problem", 1980; the rule is that of Steiner and Yeomans, 1993).  Each class begins with a random part
    of a row to its credit or debit (all of these add up to less than a row, as no place can be given to two), the same in all
    segments, as it ends with that, too.
    """
    n = len(classes)
    offsets, paces, done = np.empty(len(begin)), np.empty(len(begin)), np.zeros(len(begin), np.int64)
    heap, due = np.empty(len(begin), np.int64), np.empty(len(begin))  # classes that may come, and when each has to
    waiting, behind = np.full(n + 1, -1), np.full(len(begin), -1)  # lists of classes by the place from which on they may
    held, total = 0, 0.0
    for c in range(len(begin)):
        offsets[c] = _uniform(key, 0, c)
        total += offsets[c]
    total = _uniform(key, 1, 0) * (1 - (total - math.floor(total)))
    for c in range(len(begin)):
        before = math.floor(total)
        total += offsets[c]
        offsets[c] -= math.floor(total) - before
        if end[c] > begin[c]:
            paces[c] = n / (end[c] - begin[c])
            due[c] = (1 - offsets[c]) * paces[c]
            from_there = np.int64(max(-offsets[c], 0) * paces[c])
            behind[c] = waiting[from_there]
            waiting[from_there] = c
    ahead = 0
    for k in range(n):
        while ahead <= k or held == 0:
            c = waiting[ahead]
            while c >= 0:
                held = _push(heap, due, held, c)
                c = behind[c]
            ahead += 1
        c = heap[0]
        held = _pop(heap, due, held)
        classes[k], numbers[k] = c, begin[c] + done[c]
        done[c] += 1
        if begin[c] + done[c] < end[c]:
            due[c] = (done[c] + 1 - offsets[c]) * paces[c]
            from_there = np.int64((done[c] - offsets[c]) * paces[c])
            if from_there < ahead:
                held = _push(heap, due, held, c)
            else:
                behind[c] = waiting[from_there]
                waiting[from_there] = c


@nb.njit(nogil=True, cache=True)
def _push(heap: Any, due: Any, held: int, new: int) -> int:
    """Put one on a heap of so many, the earliest first."""
    at = held
    while at > 0 and due[new] < due[heap[(at - 1) // 2]]:
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = new
    return held + 1


@nb.njit(nogil=True, cache=True)
def _pop(heap: Any, due: Any, held: int) -> int:
    """Take the first one off."""
    last, at = heap[held - 1], 0
    while True:
        child = 2 * at + 1
        if child + 1 < held - 1 and due[heap[child + 1]] < due[heap[child]]:
            child += 1
        if child >= held - 1 or due[last] <= due[heap[child]]:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = last
    return held - 1
