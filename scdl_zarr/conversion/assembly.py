"""What the commit writes beside the shards: tables, provenance and the root document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from scdl_zarr.conversion.construction import Construction
from scdl_zarr.conversion.elements import EncodedElements
from scdl_zarr.conversion.origins import carried_origins
from scdl_zarr.conversion.plan import ConversionOptions, MatrixPlan
from scdl_zarr.conversion.remote_building import RemoteConstruction
from scdl_zarr.conversion.row_runs import merge_runs, unpack_runs
from scdl_zarr.conversion.running import tasks_of_store
from scdl_zarr.conversion.shards import ShardResult
from scdl_zarr.conversion.survey import Survey
from scdl_zarr.conversion.values import union_stats
from scdl_zarr.storage.schema import FORMAT_VERSION, group_node, matrix_nodes, root_document, unsorted_rows_name

__all__ = ["add_skipped", "commit_store", "encode_tables", "recorded_plan"]

DICT_GROUPS = ("layers", "obsm", "obsp", "varm", "varp", "uns", "uns/scdl", "uns/scdl/unsorted_rows")


def encode_tables(survey: Survey) -> EncodedElements:
    """var, and of what has a row for each cell all that is not written by tasks.

    A column that no AnnData store can hold is a SourceError.
    """
    elements = EncodedElements()
    survey.cells.add_to(elements)
    elements.add_frame("var", survey.vocabulary.frame())
    return elements


def commit_store(
    construction: Construction | RemoteConstruction,
    survey: Survey,
    options: ConversionOptions,
    results: dict[str, list[ShardResult]],
    elements: EncodedElements,
    record: Mapping[str, Any],
) -> None:
    """Commit a store whose shards are all written.

    `elements` are its tables, from :func:`encode_tables`; `record` is what it says of its conversion.
    """
    _add_provenance(elements, survey, results)
    nodes = {name: group_node("dict") for name in DICT_GROUPS} | elements.nodes()
    for path in survey.plans:
        nodes |= matrix_nodes(survey.plans[path].layout)
    document = root_document(nodes, _header(survey, options, results, record))
    tasks = list(tasks_of_store(construction, survey, options))
    construction.commit(document, nodes, elements.objects(), tasks)


def recorded_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the plan that the finished store keeps: nothing of when and where."""
    names = [{"name": source["name"], "size": source["size"]} for source in plan["sources"]]
    return {"options": plan["options"], "sources_digest": plan["digest"], "n_sources": len(names)}


def _header(
    survey: Survey, options: ConversionOptions, results: dict[str, list[ShardResult]], record: Mapping[str, Any]
) -> dict[str, Any]:
    from scdl_zarr import __version__

    main = survey.plans["X"].layout
    return {
        "format_version": FORMAT_VERSION,
        "writer": f"scdl-zarr {__version__}",
        "n_obs": main.n_obs,
        "n_vars": main.n_vars,
        "nnz": main.nnz,
        "profile": options.profile,
        "width": survey.width,
        "matrices": {
            path: {"float32_exact": union_stats(result.stats for result in results[path]).float32_exact} for path in survey.plans
        },
        "left_out": survey.left_out,
        "conversion": dict(record),
        **({"splits": survey.splits} if survey.splits else {}),
    }


def _add_provenance(elements: EncodedElements, survey: Survey, results: dict[str, list[ShardResult]]) -> None:
    """``uns/scdl``: sources, blocks, var tables and unsorted rows, in a fixed number of arrays."""
    import pandas as pd

    plan, packer = survey.plans["X"], survey.vocabulary.packer
    sums = [0] * len(survey.specs)
    for result in results["X"]:
        for source, value in result.checksums:
            sums[source] = (sums[source] + value) % 2**64
    known = [origin.checksum if origin else None for origin in survey.origins]
    sums = [found if recorded is None else recorded for recorded, found in zip(known, sums, strict=True)]
    sizes = [origin.size_bytes if origin else spec.size for origin, spec in zip(survey.origins, survey.specs, strict=True)]
    sources = {
        "name": _texts(spec.name for spec in survey.specs),
        "matrix": _texts(survey.matrix_names),
        "n_obs": np.array([source.header.n_obs for source in plan.sources], np.int64),
        "nnz": np.array([source.header.nnz for source in plan.sources], np.int64),
        "checksum": np.array(sums, np.uint64),
        "size_bytes": np.array(sizes, np.int64),
        "table": np.array(survey.tables, np.int64),
    }
    blocks = _blocks(plan, survey.tables)
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in survey.vocabulary.maps])])[:-1].astype(np.int64)
    tables = {
        "n_vars": np.array(packer.lengths, np.int64),
        "map_start": starts,
        "index_name": _texts(packer.index_names),
    }
    directory = {
        name: _texts(values)
        if name in ("column", "part", "encoding")
        else np.array(values, bool if name == "ordered" else np.int64)
        for name, values in packer.directory.items()
    }
    add_skipped(elements, {one.name: (one.reason, one.size) for one in survey.skipped})
    origins = carried_origins(survey.specs, pd.DataFrame(sources))
    if origins is not None:
        elements.add_frame("uns/scdl/origins", origins)
    for name, columns in (("sources", sources), ("blocks", blocks), ("tables", tables), ("directory", directory)):
        elements.add_frame(f"uns/scdl/{name}", pd.DataFrame(columns))
    elements.add_array("uns/scdl/maps", np.concatenate(survey.vocabulary.maps).astype(np.int32))
    elements.add_array("uns/scdl/pool", packer.pool())
    for path in survey.plans:
        runs = merge_runs([unpack_runs(result.unsorted) for result in results[path] if result.unsorted])
        elements.add_array(f"uns/scdl/unsorted_rows/{unsorted_rows_name(path)}", runs)


def add_skipped(elements: EncodedElements, skipped: Mapping[str, tuple[str, int]]) -> None:
    """``uns/scdl/skipped``, if there are any: names of sources that the store goes without, with the reasons and their sizes."""
    import pandas as pd

    if skipped:
        columns = {
            "name": _texts(skipped),
            "reason": _texts(reason for reason, _ in skipped.values()),
            "size_bytes": np.array([size for _, size in skipped.values()], np.int64),
        }
        elements.add_frame("uns/scdl/skipped", pd.DataFrame(columns))


def _texts(values: Iterable[str]) -> np.ndarray[Any, np.dtype[np.object_]]:
    return np.array(list(values), dtype=object)


def _blocks(plan: MatrixPlan, tables: list[int]) -> dict[str, Any]:
    """Neighbouring sources with one var table are one block; sources without rows are in none."""
    rows: list[list[int]] = []
    for source, table in zip(plan.sources, tables, strict=True):
        start, stop = source.row_start, source.row_start + source.header.n_obs
        if start == stop:
            continue
        if rows and rows[-1][2] == table:
            rows[-1][1] = stop
        else:
            rows.append([start, stop, table])
    table_of = np.array(rows, np.int64).reshape(-1, 3)
    return {"row_start": table_of[:, 0], "row_stop": table_of[:, 1], "table": table_of[:, 2]}
