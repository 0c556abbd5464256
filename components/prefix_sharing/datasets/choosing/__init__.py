"""Choosing among the records of a data set, or of several: duplicates, scores, and selections within a budget."""

from prefix_sharing.datasets.choosing.candidates import Candidates
from prefix_sharing.datasets.choosing.choice import Choice
from prefix_sharing.datasets.choosing.reading import RecordReader
from prefix_sharing.datasets.choosing.scoring import read_columns

__all__ = ["Candidates", "Choice", "RecordReader", "read_columns"]
