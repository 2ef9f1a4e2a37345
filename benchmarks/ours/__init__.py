"""What scdl-zarr does, one module a kind of case."""
