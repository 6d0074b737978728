"""Input pipelines: image folders in, `Batch`es on the training device out. They know no model."""
