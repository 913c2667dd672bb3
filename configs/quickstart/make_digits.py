"""Writes the quickstart's data set, `digits/` beside this file: 1 797 handwritten digits in the Hub's layout.

    python configs/quickstart/make_digits.py

Needs scikit-learn, which ships the digits; running it again with the same libraries gives the same bytes.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=NAMES), "text": Value("string")})
NUM_VALIDATION = 297
NUM_TRAIN_SHARDS = 2
ROW_GROUP = 128  # row groups are what the trainer shuffles
MARGIN = 1  # pixels on each side: the strokes reach the frame of 8x8 pixels

CARD = """\
---
license: cc-by-4.0
pretty_name: Handwritten digits
task_categories:
- image-classification
- text-to-image
size_categories:
- 1K<n<10K
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{names}
  - name: text
    dtype: string
  splits:
{splits}
  download_size: {download_size}
  dataset_size: {dataset_size}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
---

# Handwritten digits

{num_total} handwritten digits as 10x10 greyscale PNGs, light strokes on black, with the digit as label and a caption such
as "a handwritten seven". Small enough to train on within minutes on a CPU.

Source: *Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
[DOI 10.24432/C50P49](https://doi.org/10.24432/C50P49), CC BY 4.0, as shipped by scikit-learn (`load_digits`, the test
part of the original). Changes: values 0..16 are stretched to 0..255; a black margin of one pixel surrounds the 8x8 pixels; the
rows are shuffled and split into training and validation, stratified by digit. Made by `make_digits.py`.
"""


def main() -> None:
    digits = load_digits()
    train, validation = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_VALIDATION, stratify=digits.target, random_state=0
    )
    folder = Path(__file__).parent / "digits"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    splits, download_size, dataset_size = [], 0, 0
    for split, shards in (("train", np.array_split(train, NUM_TRAIN_SHARDS)), ("validation", [validation])):
        num_examples = num_bytes = 0
        for number, rows in enumerate(shards):
            table = to_table(digits.images[rows], digits.target[rows])
            path = folder / "data" / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            pq.write_table(table, path, row_group_size=ROW_GROUP)
            num_examples += table.num_rows
            num_bytes += table.nbytes
            download_size += path.stat().st_size
        splits.append(f"  - name: {split}\n    num_bytes: {num_bytes}\n    num_examples: {num_examples}")
        dataset_size += num_bytes
    card = CARD.format(
        names="\n".join(f"          '{label}': {name}" for label, name in enumerate(NAMES)),
        splits="\n".join(splits),
        download_size=download_size,
        dataset_size=dataset_size,
        num_total=len(digits.target),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def to_table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Rows of the data set from images (N, 8, 8) with values 0..16 and labels (N,)."""
    columns = {
        "image": [{"bytes": to_png(image), "path": None} for image in images],
        "label": labels,
        "text": [f"a handwritten {NAMES[label]}" for label in labels],
    }
    return pa.table(columns, schema=FEATURES.arrow_schema)


def to_png(image: np.ndarray) -> bytes:
    """Encodes one digit (8, 8), 0..16, as an 8-bit greyscale PNG with a margin."""
    buffer = BytesIO()
    PILImage.fromarray(np.pad(np.round(image * 255 / 16).astype(np.uint8), MARGIN)).save(buffer, format="PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
