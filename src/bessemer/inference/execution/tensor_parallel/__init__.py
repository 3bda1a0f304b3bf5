"""One model served by several processes: its shards, its executor and its workers."""
