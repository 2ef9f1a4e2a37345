"""From what a user asks for to a loader: every option checked before anything is read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from scdl_zarr.errors import OptionError
from scdl_zarr.loading.asked import Sampling
from scdl_zarr.loading.batches import Form, MatrixForm
from scdl_zarr.loading.dealing import TAILS, Tail
from scdl_zarr.loading.device import resolve_device
from scdl_zarr.loading.genes import GeneChoice
from scdl_zarr.loading.loader import Loader
from scdl_zarr.loading.orders import Chosen, Drawn, Listed, Rotated, Rule, Shuffled, Stored, Windowed
from scdl_zarr.loading.processes import as_count, as_integer, checked_epoch, resolve_ranks
from scdl_zarr.loading.row_pass import RowPass, checked_transforms
from scdl_zarr.loading.sources import RowSource, chosen_rows
from scdl_zarr.loading.splits import Split, split_rows
from scdl_zarr.loading.tokens import Tokenizer
from scdl_zarr.loading.units import LoaderOptions
from scdl_zarr.reading.exactness import checked_dtype
from scdl_zarr.reading.plan import resolve_rows

__all__ = ["make_loader"]

Shuffle = bool | Literal["window"] | None


def make_loader(
    source: RowSource,
    batch_size: int = 64,
    *,
    shuffle: Shuffle = None,
    run_rows: int = 128,
    window_rows: int = 16_384,
    rows: Any = None,
    split: Split | None = None,
    sampler: Any = None,
    weights: Any = None,
    replacement: bool = True,
    num_samples: int | None = None,
    balance: str | Sequence[str] | None = None,
    stratify: str | Sequence[str] | None = None,
    groups: Any = None,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    tail: Tail | None = None,
    prefetch: int | None = None,
    layer: str | None = None,
    genes: Any = None,
    ignore_gene_versions: bool = False,
    gene_key: str | None = None,
    transforms: Any = (),
    tokens: Any = None,
    obs: str | Sequence[str] = (),
    layers: str | Sequence[str] = (),
    obsm: str | Sequence[str] = (),
    to: Form = "torch",
    dense: bool = False,
    dtype: Any = None,
    device: Any = None,
    pin_memory: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    reuse_buffers: bool = False,
) -> Loader:
    """See :meth:`scdl_zarr.SingleCellZarrDataset.loader` and :meth:`scdl_zarr.SingleCellCollection.loader`."""
    form = MatrixForm(to=to, dense=bool(dense))
    if to != "torch" and (device is not None or pin_memory):
        raise OptionError(f"device and pin_memory are for to='torch', not for to={to!r}")
    wanted = None if dtype is None else checked_dtype(_numpy_dtype(dtype))
    if to == "scipy" and not dense and wanted == np.float16:
        raise OptionError("SciPy holds no sparse float16; choose dense=True, to='numpy' or dtype='float32'")
    if gene_key is not None and genes is None and tokens is None:
        raise OptionError(f"gene_key={gene_key!r} says where the names of genes= and tokens= are, and neither is given")
    choice, tokenizer, unversioned = None, None, bool(ignore_gene_versions)
    if genes is not None or tokens is not None:  # else the genes' names need not be read
        names = source.gene_names(gene_key)
        choice = None if genes is None else GeneChoice.of(genes, names, ignore_versions=unversioned)
        tokenizer = _tokenizer(tokens, names if choice is None else choice.names, source, unversioned, dense or dtype is not None)
    steps = RowPass.of(checked_transforms(transforms), choice, source.path, tokenizer)
    _require_fitting(steps, wanted, stacklevel=4)
    options = LoaderOptions(
        batch_size=as_count("batch_size", batch_size, smallest=1),
        tail=_tail(drop_last, tail),
        form=form,
        prefetch=None if prefetch is None else as_count("prefetch", prefetch, smallest=0),
        layer=layer,
        obs=_names("obs", obs),
        layers=_names("layers", layers),
        obsm=_names("obsm", obsm),
        steps=steps if steps.transforms or choice is not None or tokenizer is not None else None,
        layer_steps=None if choice is None else RowPass.of((), choice, source.path),
        seed=as_integer("seed", seed),
        dtype=wanted,
        device=resolve_device(device),
        pin_memory=bool(pin_memory),
        reuse_buffers=bool(reuse_buffers),
    )
    resolve_ranks(rank, world_size)
    rows = split_rows(source, split, rows, sampler=sampler)
    sampling = Sampling(
        weights=weights, replacement=replacement, num_samples=num_samples, balance=balance, stratify=stratify, groups=groups
    )
    rule = _rule(source, shuffle, rows, sampler, sampling, options.seed, (run_rows, window_rows), options)
    if source.remote and shuffle in (None, True) and not isinstance(rule, (Drawn, Listed, Rotated)):
        said = "with shuffle=True every row is a request of its own; shuffle='window' reads runs of rows"
        if sampling.given:
            said = f"in an order by {sampling.given[0]} every row is a request of its own; a copy on a local disk is faster"
        warnings.warn(f"{source.path}: {said}", UserWarning, stacklevel=3)
    kind: Any = Loader
    if to == "torch":
        from scdl_zarr.loading.torch_dataset import TorchLoader as kind  # noqa: N813 - which class it is hangs on torch
    loader: Loader = kind(source, rule, options, epoch=checked_epoch(epoch), rank=rank, world_size=world_size)
    loader.warn_of_tail(stacklevel=4)
    return loader


def _rule(
    source: RowSource,
    shuffle: Shuffle,
    rows: Any,
    sampler: Any,
    sampling: Sampling,
    seed: int,
    sizes: tuple[int, int],
    options: LoaderOptions,
) -> Rule:
    if shuffle not in (None, True, False, "window") or (isinstance(shuffle, int) and not isinstance(shuffle, bool)):
        raise OptionError(f"shuffle={shuffle!r}; choose True, 'window' or False")
    if isinstance(sampler, str) or (sampler is not None and shuffle not in (None, False) and _is_list(sampler)):
        if rows is not None:
            raise OptionError("rows and sampler both choose rows; give one of them")
        rows, sampler = sampler, None
    sampled = sampling.rule(source, shuffle, rows, sampler, batch_size=options.batch_size, seed=seed)
    if sampled is not None:
        return sampled
    if sampler is not None:
        if rows is not None:
            raise OptionError("rows and sampler both say which rows come; give one of them")
        if shuffle not in (None, False):
            raise OptionError(f"shuffle={shuffle!r} with a sampler, which has an order of its own; leave shuffle out")
        if not _is_list(sampler):
            return Drawn(sampler, source.n_obs, seed)
        listed = Listed(resolve_rows(sampler, source.n_obs))
        return Rotated(listed) if options.tail == "drop" else listed
    chosen = chosen_rows(source, rows)
    n = source.n_obs if chosen is None else len(chosen)
    rule = _plain(n, True if shuffle is None else shuffle, seed, sizes)
    rule = Rotated(rule) if isinstance(rule, Stored) and options.tail == "drop" else rule
    return rule if chosen is None else Chosen(rule, chosen)


def _plain(n: int, shuffle: Shuffle, seed: int, sizes: tuple[int, int]) -> Rule:
    run, window = as_count("run_rows", sizes[0], smallest=1), as_count("window_rows", sizes[1], smallest=1)
    if shuffle != "window":
        return Shuffled(n=n, seed=seed) if shuffle else Stored(n=n)
    if window < run:
        raise OptionError(f"window_rows={window} holds no run of run_rows={run}; a window mixes several runs")
    return Windowed(n=n, seed=seed, run_rows=run, window_rows=-(-window // run) * run)


def _tokenizer(tokens: Any, names: Any, source: RowSource, unversioned: bool, of_matrix: bool) -> Tokenizer | None:
    """The scheme of tokens for these genes."""
    if tokens is None:
        return None
    if isinstance(tokens, type) or not hasattr(tokens, "bind"):
        raise OptionError(f"tokens={tokens!r:.200}; expected a scheme such as GeneValues(length=2048), of scdl_zarr.tokens")
    if of_matrix:
        raise OptionError("dense and dtype say how X comes, and with tokens= there is none")
    found: Tokenizer = tokens.bind(names, ignore_versions=unversioned)
    if found.totals is not None and source.label(found.totals).categories is not None:
        raise OptionError(f"totals={found.totals!r}: this column of obs holds no numbers")
    return found


def _require_fitting(steps: RowPass, dtype: Any, *, stacklevel: int) -> None:
    """Refuse integers where transforms make fractions, and warn of tokens by rank that are made of something else than counts."""
    if steps.fractions and dtype is not None and dtype.kind != "f":
        raise OptionError(f"dtype={str(dtype)!r} of what {steps.fractions[0]!r} makes fractions of; choose a float dtype")
    if steps.fractions and steps.tokenizer is not None and steps.tokenizer.of_counts:
        warnings.warn(
            f"RankValue normalises counts by itself, and {', '.join(map(repr, steps.fractions))} leave none: the order of the "
            "genes is another one than the published",
            UserWarning,
            stacklevel=stacklevel,
        )


def _is_list(sampler: Any) -> bool:
    """Whether it is a list of rows, and no sampler that draws one."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(sampler, torch.Tensor)
    return tensor or isinstance(sampler, (list, tuple, range, slice, np.ndarray)) or hasattr(sampler, "to_numpy")


def _tail(drop_last: Any, tail: Any) -> Tail:
    if drop_last and tail not in (None, "drop"):
        raise OptionError(f"drop_last=True and tail={tail!r} contradict each other; give one of them")
    found: Tail = "drop" if drop_last else "uneven" if tail is None else tail
    if found not in TAILS:
        raise OptionError(f"tail={tail!r}; choose {', '.join(map(repr, TAILS))}")
    return found


def _names(option: str, names: Any) -> tuple[str, ...]:
    """Names given as one, or as a list; None is none."""
    if names is None or isinstance(names, str):
        return () if names is None else (names,)
    try:
        found = tuple(dict.fromkeys(names))
    except TypeError:
        found = (names,)
    odd = [name for name in found if not isinstance(name, str)]
    if odd:
        raise OptionError(f"{option}={names!r:.200}; expected a name, or a list of names")
    return found


def _numpy_dtype(dtype: Any) -> Any:
    """NumPy's dtype for one of torch's."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return dtype
