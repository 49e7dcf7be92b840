"""A run that learns from a stream, killed in many steps and gone on with by one and two processes: the same samples, to the id.

python -m tests.campaigns.stream_kills --kills 20
"""

import argparse
import os
import tempfile
from pathlib import Path

from tests.test_streaming import STEPS, killed_again_and_again, write_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help=f"at most {STEPS - 2}")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GPT2LAB_CACHE"] = f"{folder}/cache"
        write_texts(Path(folder, "texts"))
        killed_again_and_again(Path(folder), kills)
    print(f"{kills} kills, {STEPS} steps: every sample is the same")


if __name__ == "__main__":
    main()
