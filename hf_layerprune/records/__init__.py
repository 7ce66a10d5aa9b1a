"""What a model folder says about itself: lineage, history, metrics, licences."""
