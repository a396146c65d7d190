"""Data sets and their images; dataset/registry.py explains the names below, which other code uses."""

from dataset.coco import CocoDataset
from dataset.record import Dataset, DatasetError, Record, TooManyDropped
from dataset.registry import class_difference, find_records, get_dataset, get_datasets, register, short_names

__all__ = [
    "CocoDataset",
    "Dataset",
    "DatasetError",
    "Record",
    "TooManyDropped",
    "class_difference",
    "find_records",
    "get_dataset",
    "get_datasets",
    "register",
    "short_names",
]
