"""One file a model family, named by its `model_type`; see `models/family.py`."""
