"""Readers of .parquet and .arrow files, with what Arrow adds taken out again."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tabletune.data.table_file import ReadOptions, TableFile

BATCH_ROWS = 1000
BUFFER_BYTES = 2**20
Feature = dict[str, Any] | list[Any] | None


def read_parquet(path: Path, name: str, options: ReadOptions) -> TableFile:
    """A .parquet file, read in pieces."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, buffer_size=BUFFER_BYTES)
    schema = file.schema_arrow

    def rows(wanted: list[str]) -> Iterator[dict[str, Any]]:
        columns = [column for column in wanted if column in schema.names]
        yield from rows_of_batches(file.iter_batches(BATCH_ROWS, columns=columns), schema)

    return TableFile(list(schema.names), rows)


def read_arrow(path: Path, name: str, options: ReadOptions) -> TableFile:
    """A file of a folder that `datasets` has saved."""
    from datasets import Dataset

    table = Dataset.from_file(str(path)).with_format("arrow")
    schema = table.features.arrow_schema

    def rows(wanted: list[str]) -> Iterator[dict[str, Any]]:
        columns = [column for column in wanted if column in table.column_names]
        yield from rows_of_batches(table.select_columns(columns).iter(BATCH_ROWS), schema)

    return TableFile(list(table.column_names), rows)


def rows_of_batches(batches: Iterable[Any], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """Yield the rows of Arrow batches as the source had them (see `source_value`)."""
    features = features_of_schema(schema)
    for batch in batches:
        for row in batch.to_pylist():
            yield {
                name: source_value(value, schema.field(name).type, features.get(name))
                for name, value in row.items()
            }


def features_of_schema(schema: pa.Schema) -> dict[str, Feature]:
    """What `datasets` has written about the columns of a file, {name: feature}.

    {} where it has written nothing.
    """
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    return json.loads(metadata).get("info", {}).get("features") or {}


def source_value(value: Any, data_type: pa.DataType, feature: Feature) -> Any:
    """A value as it was in the table that the file was made from.

    An object loses the fields that are null: Arrow gives every object the fields of all. A float of
    32 bits gets its shortest decimals (0.3, not 0.30000001192092896), a class label its name, and a
    map becomes an object.
    """
    if value is None:
        return None
    is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    if is_label and isinstance(feature, dict) and isinstance(value, int):
        names = feature.get("names") or []
        return names[value] if 0 <= value < len(names) else None  # -1: without a label
    if pa.types.is_struct(data_type):
        inner = _inner_features(feature)
        fields = {
            data_type.field(i).name: data_type.field(i).type for i in range(data_type.num_fields)
        }
        result = {
            name: source_value(item, fields[name], inner.get(name)) for name, item in value.items()
        }
        return {name: item for name, item in result.items() if item is not None}
    if pa.types.is_map(data_type):
        # Arrow gives a map as a list of pairs
        return {str(key): source_value(item, data_type.item_type, None) for key, item in value}
    if _is_list(data_type):
        item_feature = _item_feature(feature)
        return [source_value(item, data_type.value_type, item_feature) for item in value]
    if pa.types.is_float32(data_type):
        # str of a float32 has the fewest digits that give the same float32
        return float(str(np.float32(value)))
    if pa.types.is_float16(data_type):
        return float(str(np.float16(value)))
    return value


def _is_list(data_type: pa.DataType) -> bool:
    return (
        pa.types.is_list(data_type)
        or pa.types.is_large_list(data_type)
        or pa.types.is_fixed_size_list(data_type)
    )


def _inner_features(feature: Feature) -> dict[str, Feature]:
    """The features of an object's fields.

    A sequence of objects is stored as an object of sequences.
    """
    if not isinstance(feature, dict):
        return {}
    if feature.get("_type") == "Sequence" and isinstance(feature.get("feature"), dict):
        return {name: [item] for name, item in feature["feature"].items()}
    return feature


def _item_feature(feature: Feature) -> Feature:
    """The feature of a list's items."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    if isinstance(feature, dict):
        return feature.get("feature")
    return None
