"""The forms that preference data comes in, each with a reader, and recognizing which one a data set has.

To add a form, write its reader in the module it belongs to and a line of ``FORMS`` in ``registry.py``.
"""

from prefix_sharing.datasets.forms.comparison import Comparison
from prefix_sharing.datasets.forms.record import Record, RecordError
from prefix_sharing.datasets.forms.registry import FORMS, Form, check_column_map, choose_form, recognize_form

__all__ = [
    "FORMS",
    "Comparison",
    "Form",
    "Record",
    "RecordError",
    "check_column_map",
    "choose_form",
    "recognize_form",
]
