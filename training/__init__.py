"""Training the models that the engine runs."""

if not __name__.startswith("protnest."):
    _message = f"import protnest.training, not {__name__}: the bare folder name belongs to other projects"
    raise ImportError(_message)
