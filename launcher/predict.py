"""Predict the structures of a file in the task's own format, labelled or not.

python launcher/predict.py runs/my-run --input tweets.conll --output tagged.conll
"""

import argparse
import sys
from pathlib import Path

from ispen_dist.config import ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.prediction_files import predict_file
from ispen_dist.predictor import ModelError, Predictor


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, or its model/ folder")
    parser.add_argument("--input", type=Path, required=True, help="file to read; plain or .gz")
    parser.add_argument("--output", type=Path, help="file to write; default: standard output")
    parser.add_argument(
        "--probabilities", action="store_true", help="also write the probability of each decision"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="multi-label: decision threshold; default: as the run decides",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    arguments = parser.parse_args()
    try:
        predictor = Predictor.from_pretrained(arguments.run, arguments.device)
        predict_file(
            predictor,
            arguments.input,
            arguments.output,
            probabilities=arguments.probabilities,
            threshold=arguments.threshold,
        )
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
