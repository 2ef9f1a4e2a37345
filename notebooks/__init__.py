"""Notebooks, kept without outputs and executed by the tests."""
