"""Sources of batches: a source maps the number of a step to a dictionary of numpy arrays, and nothing else.

Because a batch depends on the step alone, a resumed run sees the batches that an uninterrupted one would have seen.
"""

from ddistill.data.arrays import ArraySource, Source, label_dropout
from ddistill.data.digits import Digits, load_digits

__all__ = ["ArraySource", "Digits", "Source", "label_dropout", "load_digits"]
