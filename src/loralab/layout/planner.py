"""From the examples of one optimizer step to its micro-batches.

Owns how a step is cut. Whatever it decides changes memory and time, never loss or gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch, StepBatch, collate_rows
from loralab.layout.tree import PackedRow, build_rows


@dataclass(frozen=True, slots=True)
class Planner:
    """Cuts a step into micro-batches of at most `examples_per_micro_batch` examples, padded.

    Attributes:
        examples_per_micro_batch: B of DESIGN's `B x K x D`.
    """

    examples_per_micro_batch: int

    def __call__(self, examples: Sequence[TokenizedExample]) -> StepBatch:
        """Lay out one step of this rank.

        Args:
            examples: at most B x K of them, in the step's order.
        """
        laid_out = build_rows(examples)
        size = self.examples_per_micro_batch
        groups = [laid_out[start : start + size] for start in range(0, len(laid_out), size)]
        return StepBatch(
            micro_batches=tuple(self._micro_batch(group) for group in groups),
            supervised_tokens=sum(example.supervised_tokens for example in examples),
            rows=tuple((example.source, example.row) for example in examples),
        )

    @staticmethod
    def _micro_batch(group: Sequence[Sequence[PackedRow]]) -> MicroBatch:
        return collate_rows([row for rows in group for row in rows])
