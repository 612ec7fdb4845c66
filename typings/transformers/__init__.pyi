# What we call of it. pyright would read 3,000 files of its models to find these names.
from typing import Any

AutoTokenizer: Any
PreTrainedTokenizerFast: Any
