"""Sets of cells of one group, each cell with a control that matches it: what models of perturbations are trained on.

::

    groups        cell_type, perturbation, donor          (B, drug 1, d7): 70 cells ──► sets of 32: 32 | 32 | 6 and 26 again
    order         all sets of all groups, permuted        |  set  |  set  |  set  | ...     a set's positions stay together
    controls      perturbation is "control"               of (B, d7): for each set another permutation of them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.classes import Classes, codes_of, compact, sorted_by
from scdl_zarr.loading.orders import key_of, permute_each
from scdl_zarr.loading.processes import as_count
from scdl_zarr.loading.sampling import ByClass, digest_arrays
from scdl_zarr.loading.state import digest_facts
from scdl_zarr.reading.plan import Int64Array

if TYPE_CHECKING:
    import pandas as pd

    from scdl_zarr.loading.sources import RowSource

__all__ = ["CellSets", "SetOrder", "SetRows", "Sets"]

NAMED_GROUPS, NAMED_VALUES = 5, 20  # in a message


@dataclass(frozen=True, kw_only=True)
class CellSets:
    """What ``loader(groups=...)`` gives together: sets of cells that agree in columns of obs, and controls for them.

    Parameters
    ----------
    by
        The columns: cells of a set have the same value in each of them.
    size
        Cells of a set; by default those of a batch, which else holds several whole sets.
    controls
        By which values of which columns control cells are known: ``{"perturbation": "control"}``, or a list of values.  They
        form no sets of their own (but see `control_sets`); with each cell of a set one of them comes along.
    match
        The columns, among those of `by`, in which a control agrees with its cell; by default all but those of `controls`.
    incomplete
        A group of n cells has ``n / size`` sets in an epoch.  What is left over is one more set, filled up with further cells of
        the group, so that all sets are full (``"fill"``, the default; a group of fewer cells than a set has some several times);
        or it is left out, other cells in each epoch (``"drop"``).
    unmatched
        Groups for which there is no control are an error (the default), or left out (``"drop"``).
    control_sets
        Control cells form sets as well, and each has a control of its own key, which at times may be itself.

    Notes
    -----
    Each epoch permutes a group's cells, and all sets of all groups.  The controls of a set are all different where there are
    enough of them; otherwise each of them comes as often as any other, to within one.  Memory: 4 bytes a cell (8 from 2**32 rows
    on) and about 100 bytes a group.

    Examples
    --------
    >>> from scdl_zarr import CellSets
    >>> CellSets(["cell_type", "perturbation"], size=32, controls={"perturbation": "control"}).match
    ('cell_type',)
    """

    by: Any = field(kw_only=False)
    size: int | None = None
    controls: Mapping[str, Any] | None = None
    match: Any = None
    incomplete: Literal["fill", "drop"] = "fill"
    unmatched: Literal["error", "drop"] = "error"
    control_sets: bool = False

    def __post_init__(self) -> None:
        by = _columns("by", self.by)
        if not by:
            raise OptionError("CellSets(by=[]): name the columns of obs in which the cells of a set agree")
        if self.size is not None:
            as_count("size", self.size, smallest=1)
        if self.controls is not None and (not isinstance(self.controls, Mapping) or not self.controls):
            raise OptionError(
                f"controls={self.controls!r}; expected columns and the values that mark controls, as in "
                "{'perturbation': 'control'}"
            )
        if self.controls is None and (self.match is not None or self.control_sets):
            raise OptionError("match and control_sets are of controls; say with controls= which cells these are")
        match = (
            [name for name in by if name not in (self.controls or {})] if self.match is None else _columns("match", self.match)
        )
        other = [name for name in match if name not in by]
        if other:
            raise OptionError(
                f"match={list(match)!r}: {other[0]!r} is not among by={list(by)!r}, so a set may have several of its values"
            )
        for option, value, choices in (
            ("incomplete", self.incomplete, ("fill", "drop")),
            ("unmatched", self.unmatched, ("error", "drop")),
        ):
            if value not in choices:
                raise OptionError(f"{option}={value!r}; choose {' or '.join(map(repr, choices))}")
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "match", None if self.controls is None else tuple(match))

    @classmethod
    def given(cls, groups: Any) -> CellSets:
        """What a user gives as `groups`: sets, or the columns of some."""
        return groups if isinstance(groups, cls) else cls(groups)


def _columns(option: str, names: Any) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else names
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found) or len(set(found)) < len(found):
        raise OptionError(f"{option}={names!r:.200}; expected a column of obs, or a list of different ones")
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """The pool of controls that each group has."""

    rows: ByClass
    pools: Int64Array  # of each group


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """The sets of all groups in permuted order."""

    rows: ByClass
    size: int
    controls: Controls | None
    groups: pd.DataFrame
    first_sets: Int64Array  # of each group, and how many there are
    seed: int
    told: str
    window_rows: int = field(default=0, init=False)

    @classmethod
    def of(cls, asked: CellSets, source: RowSource, rows: Int64Array | None, *, batch_size: int, seed: int) -> Sets:
        """The rule for chosen rows (None: all).

        Raises
        ------
        OptionError
            A batch holds no whole number of sets, a column has missing values, no cell is a control, or a group has none.
        """
        size = batch_size if asked.size is None else as_count("size", asked.size, smallest=1)
        if batch_size % size:
            raise OptionError(f"batch_size={batch_size} holds no whole number of sets of size={size}; choose a multiple of it")
        classes = Classes.of(source, asked.by, rows, "groups")
        cells, controls = np.ones(len(classes.codes), bool), None
        if asked.controls is not None:
            marked = _marked(asked.controls, source, rows)
            if not asked.control_sets:
                cells = ~marked
            controls = _pools(asked, classes, marked, rows, source.n_obs)
        kept = np.bincount(classes.codes[cells], minlength=len(classes)) > 0
        if controls is not None:
            kept &= ~_unmatched(asked, classes, kept, controls)
        numbers = np.cumsum(kept) - 1  # of the groups that have sets
        mine = np.flatnonzero(cells & kept[classes.codes])
        found, starts = sorted_by(
            numbers[classes.codes[mine]], int(kept.sum()), mine if rows is None else rows[mine], source.n_obs
        )
        of_groups = ByClass(rows=found, starts=starts, sizes=np.diff(starts), told=digest_arrays(found, starts))
        counts = of_groups.sizes // size if asked.incomplete == "drop" else -(-of_groups.sizes // size)
        facts = {"rows": of_groups.told}
        if controls is not None:
            controls = Controls(rows=controls.rows, pools=controls.pools[kept])
            facts |= {"controls": controls.rows.told, "pools": digest_arrays(controls.pools)}
        return cls(
            rows=of_groups,
            size=size,
            controls=controls,
            groups=classes.frame()[kept].reset_index(drop=True),
            first_sets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            seed=seed,
            told=digest_facts({**facts, "incomplete": asked.incomplete}),
        )

    @property
    def grain(self) -> int:
        """Positions that stay together."""
        return self.size

    @property
    def held_bytes(self) -> int:
        """Memory of lists of rows."""
        pooled = 0 if self.controls is None else self.controls.rows.held_bytes + self.controls.pools.nbytes
        return self.rows.held_bytes + self.first_sets.nbytes + pooled

    def __len__(self) -> int:
        return int(self.first_sets[-1]) * self.size

    def epoch(self, number: int) -> SetOrder:
        return SetOrder(self, number)

    def describe(self) -> dict[str, Any]:
        return {"rule": "cell sets", "sets": self.told, "size": self.size, "seed": self.seed}


def _marked(controls: Mapping[str, Any], source: RowSource, rows: Int64Array | None) -> npt.NDArray[np.bool_]:
    """Which of chosen rows are controls."""
    marked = np.ones(source.n_obs if rows is None else len(rows), bool)
    for name, values in controls.items():
        codes, table = codes_of(source.label(name), rows)
        wanted = list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else [values]
        known = list(table)
        unknown = [value for value in wanted if value not in known]
        if unknown or not wanted:
            listed = ", ".join(map(repr, known[:NAMED_VALUES])) + (", ..." if len(known) > NAMED_VALUES else "")
            what = f"no cell is {unknown[0]!r}" if unknown else "no value is listed"
            raise OptionError(f"controls={dict(controls)!r:.200}: {what} in obs column {name!r}, which has: {listed}")
        marked &= np.isin(codes, [known.index(value) for value in wanted])
    if not marked.any():
        raise OptionError(f"controls={dict(controls)!r:.200}: none of the {len(marked)} rows is a control")
    return marked


def _pools(asked: CellSets, classes: Classes, marked: npt.NDArray[np.bool_], rows: Int64Array | None, n_obs: int) -> Controls:
    """The controls by what they have in the columns that have to match; and for each class which of these pools is its own."""
    pools = np.zeros(len(classes), np.int64)
    for name in asked.match:
        own = classes.columns[name]
        width = int(own.max(initial=0)) + 1
        pools, _ = compact(pools * width + own, width * (int(pools.max(initial=0)) + 1))
    mine = np.flatnonzero(marked)
    found, starts = sorted_by(
        pools[classes.codes[mine]], int(pools.max(initial=0)) + 1, mine if rows is None else rows[mine], n_obs
    )
    return Controls(
        rows=ByClass(rows=found, starts=starts, sizes=np.diff(starts), told=digest_arrays(found, starts)), pools=pools
    )


def _unmatched(asked: CellSets, classes: Classes, kept: npt.NDArray[np.bool_], controls: Controls) -> npt.NDArray[np.bool_]:
    """Which of the kept groups have no control."""
    without: npt.NDArray[np.bool_] = kept & (controls.rows.sizes[controls.pools] == 0)
    if asked.unmatched == "error" and without.any():
        numbers = np.flatnonzero(without).tolist()
        named = "; ".join(classes.name(number) for number in numbers[:NAMED_GROUPS])
        more = "; ..." if len(numbers) > NAMED_GROUPS else ""
        raise OptionError(
            f"{len(numbers)} of {int(kept.sum())} groups have no control of the same {', '.join(asked.match)}: {named}{more}; "
            "leave them out with unmatched='drop', or match fewer columns"
        )
    return without


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRows:
    """What lies at some positions: rows and, in an order of sets, the control of each, and its group."""

    rows: Int64Array
    controls: Int64Array | None
    groups: Int64Array | None

    def cut(self, start: int, stop: int) -> SetRows:
        """Some neighbouring ones of them."""
        controls = None if self.controls is None else self.controls[start:stop]
        groups = None if self.groups is None else self.groups[start:stop]
        return SetRows(rows=self.rows[start:stop], controls=controls, groups=groups)


class SetOrder:
    """One epoch of :class:`Sets`."""

    def __init__(self, rule: Sets, epoch: int) -> None:
        self.rule = rule
        self._of_sets, self._of_cells, self._of_controls = (
            key_of(f"cell sets, {word}", rule.seed, epoch) for word in ("sets", "cells", "controls")
        )

    def __len__(self) -> int:
        return len(self.rule)

    def take(self, positions: Int64Array) -> Int64Array:
        return self._cells(*self._placed(positions))[0]

    def look_up(self, positions: Int64Array) -> SetRows:
        """The rows at these positions, their controls, and their groups."""
        sets, inside = self._placed(positions)
        rows, groups = self._cells(sets, inside)
        pools = self.rule.controls
        if pools is None:
            return SetRows(rows=rows, controls=None, groups=groups)
        pool = pools.pools[groups]
        turns, numbers = np.divmod(inside, pools.rows.sizes[pool])
        places = permute_each(numbers, pools.rows.sizes[pool], sets, turns, self._of_controls)
        controls = pools.rows.rows[pools.rows.starts[pool] + places].astype(np.int64)
        return SetRows(rows=rows, controls=controls, groups=groups)

    def _placed(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The number of the set at each position, and which of its cells it is."""
        places, inside = np.divmod(positions, self.rule.size)
        nothing = np.zeros_like(places)
        sets = permute_each(places, np.full_like(places, self.rule.first_sets[-1]), nothing, nothing, self._of_sets)
        return sets, inside

    def _cells(self, sets: Int64Array, inside: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Cells of sets, and their groups."""
        rule = self.rule
        groups = np.searchsorted(rule.first_sets, sets, side="right") - 1
        numbers = ((sets - rule.first_sets[groups]) * rule.size + inside) % rule.rows.sizes[groups]
        return rule.rows.take(groups, numbers, np.zeros_like(groups), self._of_cells), groups
