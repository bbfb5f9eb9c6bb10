//! Windowed time series: CSV to normalised Parquet shards to masked batches.
