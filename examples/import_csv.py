"""Imports a CSV into a dataset, piece by piece: the file may be larger than the memory.

    python examples/import_csv.py flowers flowers.csv --data data/

The columns and their types are those that pyarrow finds in the file; the first line has the names.
`forebay dataset import` does the same from the command line, and reads Parquet and npz as well.
"""

from __future__ import annotations

import argparse

from pyarrow import csv

import forebay


def main() -> None:
    parser = argparse.ArgumentParser(description="Import a CSV into a Forebay dataset.")
    parser.add_argument("name", help="of the new dataset")
    parser.add_argument("file", help="the CSV, also compressed with gzip")
    parser.add_argument("--data", default="data/", help="folder, unix:/… or grpc://host:port")
    options = parser.parse_args()
    with (
        forebay.connect(options.data) as client,
        client.create_dataset(options.name) as writer,
        csv.open_csv(options.file) as batches,
    ):
        for batch in batches:
            writer.write_table(batch)
        print(f"{options.name}: {writer.num_rows:,} rows of {writer.schema}")
    # The version became visible, whole, when the block was left; an error would have left nothing.


if __name__ == "__main__":
    main()
