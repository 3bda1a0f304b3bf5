"""One model served by several processes: its shards, its commands and its workers."""
