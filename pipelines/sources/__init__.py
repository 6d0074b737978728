"""Where images come from: folders, tables of files, tar shards. Each gives encoded bytes by index."""
