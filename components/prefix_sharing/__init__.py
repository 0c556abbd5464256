"""Preference tuning with torchtune in which every shared prefix is computed once."""

import logging

__version__ = "0.1.0"

# torchao says on import that it leaves out its C++ extensions, as it does with every torch that this package supports,
# which uses none of them. This is the one place that runs before it is imported.
logging.getLogger("torchao").addFilter(
    lambda record: not str(record.msg).startswith("Skipping import of cpp extensions due to incompatible torch version")
)
