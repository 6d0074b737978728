"""Input pipelines: image folders, tables, tar shards and .beton files in, `Batch`es on the training device
out. They know no network.
"""
