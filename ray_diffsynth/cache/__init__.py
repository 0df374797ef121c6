"""The contract between the stages: content-addressed Parquet tables behind a committed manifest."""
