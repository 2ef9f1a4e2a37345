"""Floor 4, a workshop: H5AD files in, one store out.

::

    sources/ ──► plan.py ──► ShardTask ──► shards.py ──► construction.py
    (headers)    (pure)      (picklable)   (one owner    (build folder, marks,
                                            a shard)      the commit)
                      execution.py runs the tasks on Dask
"""
