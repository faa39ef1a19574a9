"""Print the metrics of a trained run as JSON.

python launcher/evaluate.py runs/my-run --split test
"""

import argparse
import json
import sys
from pathlib import Path

from ispen_dist.config import ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import load_named
from ispen_dist.data.output_file import standard_output
from ispen_dist.predictor import ModelError, Predictor


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder, or its model/ folder")
    parser.add_argument(
        "--split", default="test", help="test (default), dev, train, or a name under data.extra"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    arguments = parser.parse_args()
    try:
        predictor = Predictor.from_pretrained(arguments.run, arguments.device)
        dataset = load_named(predictor.config, predictor.codec, arguments.split)
        metrics = predictor.evaluate(dataset)
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = {"split": arguments.split, "examples": len(dataset), **metrics}
    with standard_output():
        print(json.dumps(shown, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
