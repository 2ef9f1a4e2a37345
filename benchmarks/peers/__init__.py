"""Peers, each run by its own environment: these modules never import scdl_zarr."""
