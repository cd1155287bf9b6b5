"""Measures the operator and the layer beside their peers; see ``python -m bench --help``."""
