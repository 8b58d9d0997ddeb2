"""Many images in one file: tar shards, parquet, Arrow. They are read in place; ``fastdino shard`` packs them."""
