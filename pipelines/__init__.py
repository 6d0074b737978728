"""Input pipelines: image folders in, `Batch`es on the training device out. Knows no model."""
