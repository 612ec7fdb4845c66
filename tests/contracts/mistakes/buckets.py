"""URLs of object stores whose package is not installed, or that nothing stands for."""

from tests.contracts.mistakes import Mistake

REFUSED = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_MAX_ATTEMPTS": "1",
}
"""A store that nobody serves."""

ROWS = [
    Mistake("--data gs://bucket/set", ("--data gs://bucket/set", "pip install gcsfs")),
    Mistake("--model gs://bucket/8B", ("--model gs://bucket/8B", "pip install gcsfs")),
    Mistake("--workdir gs://bucket/run", ("--workdir gs://bucket/run", "pip install gcsfs")),
    Mistake("--workdir s3://bucket/run", "s3://bucket/run", environment=REFUSED),
    Mistake("--data s3://bucket/set", "--data s3://bucket/set", environment=REFUSED),
    Mistake("--workdir gs://bucket/run --compile-only v5p:2x2x2", "--compile-only"),
    Mistake("--set data.fetched_gb=0", "data.fetched_gb"),
    Mistake("--set output.keep_best=2 --set evaluation.every=0", "output.keep_best"),
    Mistake("--set output.keep_minutes=-1", "output.keep_minutes"),
]
