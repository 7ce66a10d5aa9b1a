"""The records of a model folder: lineage, history, metrics and licences."""
