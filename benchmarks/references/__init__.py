"""Bounds to hold ourselves against: what the hardware and the libraries below us can do."""
