"""Where data comes from."""

from __future__ import annotations

from pydantic import Field

from can_dist.config.base import Strict


class DataSource(Strict):
    """A data set, local or on the hub; its format is found by its columns."""

    source: str = Field(description="Local JSONL/Parquet/Arrow file or directory, or a hub data set id.")
    split: str = Field("train", description="Split of a hub data set or directory.")
    subset: str | None = Field(None, description="Subset (configuration) of a hub data set.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
