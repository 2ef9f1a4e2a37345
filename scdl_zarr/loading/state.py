"""Where a loader is, as a few integers: what was delivered, so that any number of ranks can go on from there.

A state names the store and the order it belongs to.  The position counts rows of the *global* order, all ranks together, so it
means the same to every number of ranks and every batch size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scdl_zarr.errors import OptionError

__all__ = ["LoaderState", "digest_facts", "identify_store"]

STATE_VERSION = 1
# what a rewritten copy may have otherwise and hold the same rows in the same order
NOT_OF_ROWS = frozenset({"chunk_values", "dtype", "dtype_tolerance", "profile", "shard_values", "width"})
BESIDE_ROWS = frozenset({"options", "set_obs"})  # of what is recorded: told apart by themselves, and columns set later


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderState:
    """What :meth:`Loader.state_dict` gives.

    Attributes
    ----------
    store, order
        Digests of which rows there are, and of the rule that orders them.
    epoch
        The epoch that comes next, or is under way.
    position
        Rows of that epoch's global order that were delivered.
    drawn
        Digest of the epoch's rows where a sampler drew them; else empty.
    worker
        In a worker process of a DataLoader: (number, workers, batches this worker has delivered, position it began at,
        batch size, ranks); else empty.  Only the same worker can go on with it.
    """

    store: str
    order: str
    epoch: int
    position: int = 0
    drawn: str = ""
    worker: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Numbers and text only; what is empty is left out."""
        found = {"version": STATE_VERSION, **asdict(self)}
        found["worker"] = list(self.worker)
        return {key: value for key, value in found.items() if value not in ("", [])}

    @classmethod
    def parse(cls, state: Any) -> LoaderState:
        """Check what a user gives back.

        Raises
        ------
        OptionError
            It is no state of a loader, or a later version wrote it.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("version"), int):
            raise OptionError(f"this is no state of a loader: {state!r:.200}; expected what state_dict() gave")
        if state["version"] != STATE_VERSION:
            raise OptionError(
                f"the loader's state has version {state['version']}, this scdl-zarr reads version {STATE_VERSION}; "
                "go on with the scdl-zarr that saved it"
            )
        given = {key: value for key, value in state.items() if key != "version"}
        try:
            worker = given.pop("worker", ())
            found = cls(**given, worker=tuple(worker))
        except TypeError as error:
            raise OptionError(f"this is no state of a loader: {error}") from None
        numbers = (found.epoch, found.position, *found.worker)
        texts = (found.store, found.order, found.drawn)
        sound = all(type(number) is int for number in numbers) and all(isinstance(text, str) for text in texts)
        if not sound or found.position < 0 or len(found.worker) not in (0, 6) or any(number < 0 for number in found.worker):
            raise OptionError(f"this is no state of a loader: {state!r:.200}")
        return found

    def require(self, store: str, order: str) -> None:
        """Refuse a state of another store or order."""
        if self.store != store:
            raise OptionError(
                "this state belongs to another store (or to this one before rows were added); open the one it was saved with"
            )
        if self.order != order:
            raise OptionError(
                "this state belongs to another order: the loader has to be made with the same rows, shuffle, seed, sampler, "
                "run_rows, window_rows, weights, replacement, num_samples, balance, stratify and groups "
                "(batch_size and the number of ranks may differ)"
            )


def digest_facts(facts: Mapping[str, Any]) -> str:
    """What tells these facts from others, in few letters."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def identify_store(header: Mapping[str, Any], n_obs: int, n_vars: int) -> str:
    """A digest of which rows a store holds and in what order, the same for copies of it, wherever they lie.

    Of another program's store only its size is known.
    """
    conversion = header.get("conversion")
    facts: dict[str, Any] = {"n_obs": n_obs, "n_vars": n_vars, "nnz": header.get("nnz")}
    if isinstance(conversion, dict):
        options = conversion.get("options")
        kept = {key: value for key, value in options.items() if key not in NOT_OF_ROWS} if isinstance(options, dict) else {}
        facts["conversion"] = {**{key: value for key, value in conversion.items() if key not in BESIDE_ROWS}, "options": kept}
    return digest_facts(facts)
