"""What is compiled while a run trains: the first steps compile, later ones should not."""

import logging

from prefix_sharing.torch_private import num_graphs_compiled

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 10
"""Steps of this process that may compile: by then Rows of several lengths have been seen."""


class CompileWatch:
    """Warns of steps that compile when all should be compiled: each graph takes seconds.

    FlexAttention and ``compile: True`` compile at a forward pass. Lengths are symbols in what they compile, so a
    handful of graphs serve all Rows; what is compiled late says that something else than lengths has changed.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._compiled = num_graphs_compiled()

    def step(self, global_step: int) -> None:
        """Looks at what was compiled since the last step.

        Args:
            global_step (int): the step that is finished, for the message.
        """
        self._steps += 1
        compiled = num_graphs_compiled()
        if self._steps == _WARM_UP_STEPS and compiled:
            log.info("%d graphs compiled in the first %d steps", compiled, _WARM_UP_STEPS)
        if self._steps > _WARM_UP_STEPS and compiled > self._compiled:
            new = compiled - self._compiled
            log.warning("Step %d compiled %d more graphs (%d in all), which took its time.", global_step, new, compiled)
        self._compiled = compiled
