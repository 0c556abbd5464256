"""Preference tuning with torchtune in which every shared prefix is computed once."""

__version__ = "0.1.0"
