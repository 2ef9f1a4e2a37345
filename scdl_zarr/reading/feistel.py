"""The compiled loops of the keyed permutation; ``permutation.py`` says what they compute.

Many words are under way at once, because the steps of one wait for each other: a lane whose word is done takes the next one.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

__all__ = ["mixed", "permute"]

LANES = 64
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


@nb.njit(nogil=True, inline="always")
def mixed(word: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the result hangs on every bit of the word."""
    word = (word ^ (word >> _S30)) * _FIRST
    word = (word ^ (word >> _S27)) * _SECOND
    return word ^ (word >> _S31)


@nb.njit(nogil=True, cache=True)
def permute(numbers: Any, n: int, low_bits: int, high_bits: int, keys: Any, backwards: bool, out: Any) -> int:
    """Where each number goes (or, backwards, comes from); the place of the first that is outside [0, n), or -1."""
    limit, one = np.uint64(n), np.uint64(1)
    shift = np.uint64(low_bits)
    low_mask, high_mask = (one << shift) - one, (one << np.uint64(high_bits)) - one
    low, high = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    places = np.empty(LANES, np.int64)
    following, lanes, steps = 0, 0, len(keys)
    while True:
        while lanes < LANES and following < len(numbers):
            number = numbers[following]
            if number < 0 or number >= n:
                return following
            low[lanes], high[lanes] = np.uint64(number) & low_mask, np.uint64(number) >> shift
            places[lanes] = following
            lanes += 1
            following += 1
        if lanes == 0:
            return -1
        if backwards:
            for r in range(steps - 2, -2, -2):
                first, second = keys[r], keys[r + 1]
                for k in range(lanes):
                    high[k] ^= mixed(low[k] ^ second) & high_mask
                    low[k] ^= mixed(high[k] ^ first) & low_mask
        else:
            for r in range(0, steps, 2):
                first, second = keys[r], keys[r + 1]
                for k in range(lanes):
                    low[k] ^= mixed(high[k] ^ first) & low_mask
                    high[k] ^= mixed(low[k] ^ second) & high_mask
        left = 0
        for k in range(lanes):
            word = (high[k] << shift) | low[k]
            if word < limit:
                out[places[k]] = np.int64(word)
            else:  # what lands outside of [0, n) goes on from there, and comes back inside
                low[left], high[left], places[left] = low[k], high[k], places[k]
                left += 1
        lanes = left
